# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on instructions: what transformers computes, at every layout, micro batch and padding, and on from a stop."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ranks import beside

from modellink.core.prepare.prepare import prepare
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer

INSTRUCTIONS = beside(__file__, "instructions")
OPTIONS = {"seq_length": 24, "micro_batch_size": 1, "global_batch_size": 8, "lr": 5e-3, "train_iters": 5, "eval_iters": 0,
           "split": "100,0,0", "device": "cpu", "seed": 7, "lr_decay_style": "constant", "log_interval": 1,
           "make_vocab_size_divisible_by": 8, "is_instruction_dataset": True, "shuffle": False}
VARIABLE: dict[str, Any] = {"variable_seq_lengths": True}
TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PACKED: dict[str, Any] = {"data_path": ("packs",), "reset_position_ids": True, "seq_length": 48, "global_batch_size": 4}
TABLE = {
    "fixed": (1, {}), "variable": (1, VARIABLE), "variable of 4": (1, VARIABLE | {"micro_batch_size": 4}),
    "fixed of 8": (1, {"micro_batch_size": 8}), "recomputed": (1, VARIABLE | {
        "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}),
    "tp2": (2, TP2 | VARIABLE | {"pad_to_multiple_of": 1, "micro_batch_size": 2}),
    "pp2": (2, PP2 | VARIABLE), "pp2 fixed": (2, PP2 | {"micro_batch_size": 2}),
    "vpp2": (2, PP2 | VARIABLE | {"num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 2}),
    "dp2": (2, VARIABLE | {"micro_batch_size": 2}), "dp2 overlapped": (2, {
        "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "cp2": (2, CP2 | VARIABLE | {"micro_batch_size": 4}),
    "cp2 ring": (2, CP2 | VARIABLE | {"context_parallel_algo": "megatron_cp_algo", "pad_to_multiple_of": 1}),
    "tp2 pp2": (4, TP2 | PP2 | VARIABLE),
    "packed": (1, PACKED), "packed cp2": (2, CP2 | PACKED), "packed cp2 ring": (2, CP2 | PACKED | {
        "context_parallel_algo": "megatron_cp_algo"}), "packed pp2": (2, PP2 | PACKED | {"micro_batch_size": 2})}


def train(options: dict[str, Any]) -> list[tuple[int, int, float, float]]:
    """On a rank: (iteration, samples, loss, gradient norm) of every step, on the last rank."""
    import torch.distributed as dist

    from modellink.core import launch, processes
    from modellink.core.api import train
    from modellink.core.prepare.prepare import prepare
    from modellink.kernels.options import Layer

    run = prepare("pretrain", [Layer("test", options)], launch.world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    processes.join(run.device, run.layout, run.optimizer.seed)
    steps = train(run)
    dist.barrier()
    return [(step.iteration, step.consumed_samples, step.loss, step.grad_norm or 0.0) for step in steps]


@pytest.fixture(scope="module")
def samples():
    return INSTRUCTIONS.make_samples(30, 131)


@pytest.fixture(scope="module")
def chats(samples, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("chats") / "chats"
    INSTRUCTIONS.write_set(prefix, samples)
    pairs = zip(samples[::2], samples[1::2], strict=True)
    INSTRUCTIONS.write_set(prefix.with_name("packs"), [INSTRUCTIONS.pack(list(pair), PACKED["seq_length"]) for pair in pairs])
    return prefix


@pytest.fixture(scope="module")
def run(pools, tiny, chats):
    """`run(layout, **options)`: the steps of a run from the tiny model (`load` replaces it)."""
    def go(layout: str, **options: Any) -> list[tuple[int, int, float, float]]:
        world_size, more = TABLE[layout]
        more = more | ({"data_path": (str(chats.with_name("packs")),)} if "data_path" in more else {})
        return pools(world_size)(train, options=OPTIONS | {"load": str(tiny), "data_path": (str(chats),)} | more | options)[-1]
    return go


@pytest.fixture(scope="module")
def plain(tiny, samples):
    return INSTRUCTIONS.plain_losses(tiny, samples, steps=5, batch=8, lr=OPTIONS["lr"])


@pytest.mark.parametrize("layout", TABLE)
def test_the_loss_is_the_mean_over_learned_tokens_of_the_global_batch(run, plain, layout):
    """Over an epoch and a third, so a new epoch starts in the middle of a batch; packed rows hold two samples each."""
    steps = run(layout)
    rows = 4 if layout.startswith("packed") else 8
    assert [step[:2] for step in steps] == [(number, rows * number) for number in range(1, 6)]
    assert [step[2] for step in steps] == pytest.approx([loss for loss, _ in plain], rel=1e-5)
    assert [step[3] for step in steps] == pytest.approx([norm for _, norm in plain], rel=1e-4)


@pytest.mark.parametrize("layout", ["variable of 4", "pp2", "dp2 overlapped"])
def test_stopping_and_going_on_changes_no_bit(run, tmp_path, layout):
    options = {"shuffle": True, "hidden_dropout": 0.1}
    straight = run(layout, **options)
    stopped = run(layout, save=str(tmp_path / "a"), exit_interval=2, **options)
    assert stopped + run(layout, load=str(tmp_path / "a"), **options) == straight


def test_the_prompt_type_is_noted_and_other_shares_are_evaluated(run, tmp_path):
    from modellink.ckpt_convert.manifest import read_manifest

    run("variable of 4", save=str(tmp_path / "a"), prompt_type="chatml", split="80,10,10", eval_iters=2, global_batch_size=8,
        train_iters=1, rampup_batch_size=(4, 4, 8))
    assert read_manifest(tmp_path / "a").prompt_type == "chatml"


def rows(prefix: str | list[str], seq_length: int, numbers: list[int], packed: bool = False, split: str = "80,20,0",
         **instruction: Any) -> list[tuple[list[int], list[int]]]:
    """On a rank: ids and learned labels of samples by number, of the training share."""
    from modellink.core.config import DataConfig, InstructionConfig
    from modellink.core.data.instruction import build_sets

    paths = (prefix,) if isinstance(prefix, str) else tuple(prefix)
    share = build_sets(DataConfig(data_path=paths, seq_length=seq_length, split=split, is_instruction_dataset=True,
                                  reset_position_ids=packed), InstructionConfig(**instruction), seed=3)[0]
    assert share is not None
    return [(share[number].tokens.tolist(), share[number].labels.tolist()) for number in numbers]


def test_every_epoch_has_every_sample_once_in_another_order(pools, chats, samples):
    first, again = (pools(1)(rows, prefix=str(chats), seq_length=24, numbers=[*range(start, start + 24)])[0]
                    for start in (0, 24))
    ids = sorted(sample["input_ids"] for sample in samples[:24])
    assert sorted(row for row, _ in first) == ids == sorted(row for row, _ in again)
    assert first != again


def test_a_blend_takes_each_set_in_its_order_and_proportion(pools, tmp_path, samples):
    """Weights 1 : 3 : 2 from any position on; the smallest set starts another epoch."""
    sets = {"a": samples[:5], "b": samples[5:15], "c": samples[15:30]}
    path = [word for weight, name in zip("132", sets, strict=True) for word in (weight, str(tmp_path / name))]
    for name, some in sets.items():
        INSTRUCTIONS.write_set(tmp_path / name, some)
    found = [ids for ids, _ in pools(1)(rows, prefix=path, seq_length=24, numbers=[*range(48)], split="100", shuffle=False)[0]]
    where = {name: [ids for ids in found if ids in [sample["input_ids"] for sample in some]] for name, some in sets.items()}
    assert {name: len(ids) for name, ids in where.items()} == {"a": 8, "b": 24, "c": 16}
    for name, some in sets.items():
        assert where[name] == [some[number % len(some)]["input_ids"] for number in range(len(where[name]))]
    for start in range(0, 48, 6):  # evenly all along
        assert sum(ids in where["b"] for ids in found[start:start + 6]) == 3
    assert pools(1)(rows, prefix=path, seq_length=24, numbers=[40], split="100", shuffle=False)[0][0][0] == found[40]


def test_a_long_sample_loses_its_end(pools, chats, samples):
    found = pools(1)(rows, prefix=str(chats), seq_length=5, numbers=[*range(24)], shuffle=False)[0]
    for (ids, labels), sample in zip(found, samples, strict=False):
        assert ids == sample["input_ids"][:5]
        assert labels == [*sample["labels"][1:5], -100][:len(ids)]


def test_packed_rows_restart_positions(pools, tmp_path, samples):
    """Of learned prompts too the first token of a sample is not learned from the sample before it."""
    learned = [sample | {"labels": sample["input_ids"]} for sample in samples[:3]]
    INSTRUCTIONS.write_set(tmp_path / "packs", [INSTRUCTIONS.pack(learned, 70)] * 5)
    _, labels, starts = pools(1)(collated, prefix=str(tmp_path / "packs"))[0]
    lengths = [len(sample["input_ids"]) for sample in learned]
    begins = [sum(lengths[:number]) for number in range(4)]
    assert starts == [begin for begin, size in zip(begins, [*lengths, 70 - sum(lengths)], strict=True) for _ in range(size)]
    assert labels[:sum(lengths)] == [label for sample in learned for label in [*sample["input_ids"][1:], -100]]


def test_packs_without_numbers_and_packs_without_separators_are_reported(pools, chats, tmp_path, samples):
    """The original's --pack leaves a mask of ones: its samples cannot be told apart, and would attend to each other."""
    ones = [INSTRUCTIONS.pack(samples[:3], 70) | {"attention_mask": [1] * 70}] * 5
    INSTRUCTIONS.write_set(tmp_path / "ones", ones)
    with pytest.raises(AssertionError, match="does not number"):
        pools(1)(rows, prefix=str(tmp_path / "ones"), seq_length=70, numbers=[0], packed=True)
    pools(1)(rows, prefix=str(chats), seq_length=24, numbers=[0], packed=True)  # one sample per row, of many lengths
    with pytest.raises(AssertionError, match="hold several samples, which attend"):
        pools(1)(noted, prefix=str(chats.with_name("packs")))
    pools(1)(noted, prefix=str(chats))


def noted(prefix: str) -> None:
    """On a rank: fail with what is printed over a set that is not taken for a packed one."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        rows(prefix, 48, [0])
    assert not printed.getvalue(), printed.getvalue()


def collated(prefix: str) -> list[list[int]]:
    from modellink.core.data.instruction import Instructions, collate

    batch = collate([Instructions(prefix, 70, packed=True)[2]], 70)
    labels = batch.labels.masked_fill(batch.loss_mask == 0, -100)
    return [part[0].tolist() for part in (batch.tokens, labels, batch.starts)]


@pytest.mark.parametrize(("changes", "message", "fix"), [
    ({"eod_mask_loss": True}, "already define loss and sample boundaries", "--reset-position-ids"),
    ({"reset_attention_mask": True}, "already define loss and sample boundaries", "--reset-attention-mask"),
    ({"data_path": ("gone",)}, "gone_packed_input_ids_document.idx is missing", "without .bin or .idx"),
    ({"data_path": ("0.5", "{}", "0.5", "gone")}, "gone_packed_input_ids_document.idx is missing", "without .bin or .idx"),
    ({"data_path": ("0.5", "{}", "0", "{}")}, "not a list of alternating weights and prefixes", "--data-path 0.3"),
    ({"is_instruction_dataset": False, "variable_seq_lengths": True, "data_path": ("{}_packed_labels_document",)},
     "--variable-seq-lengths applies to instruction data", "modellink-train sft"),
])
def test_what_cannot_work_is_refused(tiny, chats, changes, message, fix):
    options = OPTIONS | {"load": str(tiny), "data_path": (str(chats),)} | changes
    options |= {"data_path": tuple(path.format(chats) for path in options["data_path"]), "shuffle": True}
    with pytest.raises(ModelLinkError) as caught:
        prepare("pretrain", [Layer("test", options)])
    assert message in str(caught.value) and fix in str(caught.value)


def test_files_of_two_sets_and_masks_that_number_nothing_are_refused(pools, tmp_path, samples):
    INSTRUCTIONS.write_set(tmp_path / "a", samples)
    INSTRUCTIONS.write_pair(tmp_path / "a_packed_labels_document", [[1, 2]] * 30)
    with pytest.raises(AssertionError, match="labels and input_ids have samples of different lengths"):
        pools(1)(rows, prefix=str(tmp_path / "a"), seq_length=24, numbers=[0])
    INSTRUCTIONS.write_set(tmp_path / "b", [sample | {"attention_mask": sample["input_ids"]} for sample in samples])
    with pytest.raises(AssertionError, match="does not number the samples"):
        pools(1)(rows, prefix=str(tmp_path / "b"), seq_length=24, numbers=[0], packed=True)
