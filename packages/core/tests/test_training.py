# SPDX-License-Identifier: Apache-2.0
"""Equal losses at every layout, and a stopped run that resumes as if it had not been stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from modellink.kernels.owner import owned, owner_file

OPTIONS = {"seq_length": 24, "micro_batch_size": 1, "global_batch_size": 4, "lr": 5e-3, "train_iters": 5, "eval_iters": 0,
           "split": "100,0,0", "device": "cpu", "seed": 7, "lr_decay_style": "cosine", "lr_warmup_iters": 2, "log_interval": 1,
           "make_vocab_size_divisible_by": 8}
LAYOUTS = {
    "tp1": (1, {}), "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2 mc2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_mc2": True}),
    "tp2 mc2 whole": (2, {"tensor_model_parallel_size": 2, "use_mc2": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 uneven": (2, {"pipeline_model_parallel_size": 2, "num_layer_list": "1,3"}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "tp1 distributed optimizer": (1, {"use_distributed_optimizer": True}),
    "dp2": (2, {}), "dp2 distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True})}


def train(options: dict[str, Any]) -> list[tuple[int, int, float, float]]:
    """On a rank: a pretraining run; (iteration, samples, loss, gradient norm) of every step, on the last rank."""
    import torch.distributed as dist

    from modellink.core import launch, processes
    from modellink.core.api import train
    from modellink.core.prepare.prepare import prepare
    from modellink.kernels.options import Layer

    given = {name: value for name, value in (OPTIONS | options).items() if value is not None}
    run = prepare("pretrain", [Layer("test", given)], launch.world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    processes.join(run.device, run.layout, run.optimizer.seed)
    steps = train(run)
    dist.barrier()
    return [(step.iteration, step.consumed_samples, step.loss, step.grad_norm or 0.0) for step in steps]


@pytest.fixture(scope="module")
def run(pools, tiny, corpus):
    """`run(layout, **options)`: the steps of a run from the tiny model (`load` replaces it)."""
    def go(layout: str, **options: Any) -> list[tuple[int, int, float, float]]:
        world_size, more = LAYOUTS[layout]
        texts = {"load": str(tiny), "data_path": (str(corpus),)} | more | options
        return pools(world_size)(train, options=texts)[-1]
    return go


@pytest.fixture(scope="module")
def whole(run):
    return run("tp1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_are_the_same_at_every_layout(run, whole, layout):
    steps = run(layout)
    assert [step[:2] for step in steps] == [(number, 4 * number) for number in range(1, 6)]
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole], rel=2e-6)
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in whole], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", ["tp1", "tp2 sp", "pp2", "dp2 distributed optimizer"])
def test_half_precision_follows_fp32(run, whole, layout, precision):
    steps = run(layout, **{precision: True, "initial_loss_scale": 1024.0})
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole], abs=2e-2)
    assert [step[2] for step in steps] != [step[2] for step in whole]


def lose(folder: str) -> list[str]:
    """On a rank: the errors of a run that owns `folder`, after its owner file was replaced and after it was removed."""
    import torch.distributed as dist

    from modellink.core.train.ownership import LostFolder, check, own

    file, told = owner_file(folder, inside=True), []
    with own(Path(folder)):
        check(Path(folder))
        for change in (lambda: file.write_text("{}"), file.unlink):
            dist.barrier()
            if dist.get_rank() == 0:
                change()
            dist.barrier()
            try:
                check(Path(folder))
            except LostFolder as error:
                told.append(error.what)
    return told


def test_a_folder_has_one_run(pools, run, tmp_path):
    with (owned(tmp_path / "saved", inside=True),
          pytest.raises(AssertionError, match=rf"(?s)process {os.getpid()} .* is writing to this output.*rank 1:.*is writing")):
        run("dp2", save=str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    (first, second) = pools(2)(lose, folder=str(tmp_path / "saved"))
    assert first == second == ["another run has taken over --save: this run saves nothing more and ends",
                               "the owner file of this run was removed from --save: this run saves nothing more and ends"]


def test_from_random_weights_to_a_hugging_face_folder(pools, tiny, corpus, tmp_path):
    """Architecture by options, no checkpoint and the tokenizer of another model; what is saved continues, and converts."""
    import transformers

    from modellink.ckpt_convert import convert

    model = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 52,
             "vocab_size": 131, "max_position_embeddings": 64, "model_type_hf": "llama", "data_path": (str(corpus),),
             "tokenizer_name_or_path": str(tmp_path / "other")}
    (tmp_path / "other").mkdir()
    shutil.copy(tiny / "config.json", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    save = str(tmp_path / "a")
    pools(1)(train, options=model | {"save": save, "exit_interval": 2})
    steps = pools(1)(train, options=model | {"load": save, "save": save})[0]
    assert [step[0] for step in steps] == [1, 2, 3, 4, 5]
    assert (tmp_path / "a/hf/tokenizer.json").exists()
    convert(save, tmp_path / "hf", to="hf")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_key_value_heads == 2


def test_it_learns(run):
    losses = [step[2] for step in run("tp1", train_iters=40, lr=1e-2)]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.4


@pytest.mark.parametrize("layout", ["tp1", "tp2 sp", "pp2", "vpp2", "dp2 distributed optimizer"])
def test_stopping_and_going_on_changes_no_bit(run, tmp_path, layout):
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    straight = run(layout, save=str(tmp_path / "straight"), **dropout)
    stopped = run(layout, save=str(tmp_path / "a"), exit_interval=2, **dropout)
    assert len(stopped) == 2
    resumed = run(layout, load=str(tmp_path / "a"), save=str(tmp_path / "b"), **dropout)
    assert stopped + resumed == straight


@pytest.mark.parametrize(("before", "after"), [
    ("tp2 sp", "pp2"), ("dp2 distributed optimizer", "tp1 distributed optimizer"),
    ("tp1 distributed optimizer", "dp2 distributed optimizer"), ("vpp2", "tp2 sp"),
    ("tp2 pp2", "dp2")])
def test_a_run_goes_on_at_another_layout(run, whole, tmp_path, before, after):
    run(before, save=str(tmp_path / "a"), exit_interval=2)
    steps = run(after, load=str(tmp_path / "a"))
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole[2:]], rel=2e-6)


def test_finetune_takes_weights_alone(run, tmp_path):
    run("tp1", save=str(tmp_path / "a"), exit_interval=2)
    steps = run("tp1", load=str(tmp_path / "a"), finetune=True)
    assert steps[0][:2] == (1, 4)


def offline(options: dict[str, Any]) -> None:
    """On a rank: a run that must not look for a network."""
    import os

    import wandb

    os.environ["WANDB_MODE"] = "offline"
    train(options)
    wandb.teardown()  # its process writes the end of the file after the run has finished, and this waits for it


def test_weights_and_biases_without_a_network(pools, tiny, corpus, tmp_path):
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    save = tmp_path / "a"
    options = {"data_path": (str(corpus),), "save": str(save), "wandb_project": "words", "wandb_exp_name": "first"}
    pools(1)(offline, options=options | {"load": str(tiny), "exit_interval": 2})
    pools(1)(offline, options=options | {"load": str(save)})
    files = list((save / "wandb/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{(save / 'wandb.id').read_text()}.wandb"}  # one run
    assert all(b"lm loss" in file.read_bytes() for file in files)


def test_a_half_written_checkpoint_is_passed_over(run, tmp_path):
    save = tmp_path / "a"
    run("tp1", save=str(save), save_interval=2, train_iters=4)
    victim = next((save / "iter_0000004").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    steps = run("tp1", load=str(save), train_iters=4)
    assert [step[0] for step in steps] == [3, 4]


def test_the_two_kinds_of_optimizer_state_are_not_mixed(run, tmp_path, tiny, corpus):
    from modellink.core.prepare.prepare import prepare
    from modellink.kernels.errors import ModelLinkError
    from modellink.kernels.options import Layer

    run("tp1", save=str(tmp_path / "a"), exit_interval=2)
    options = OPTIONS | {"load": str(tmp_path / "a"), "data_path": (str(corpus),), "use_distributed_optimizer": True}
    with pytest.raises(ModelLinkError, match="saved with --no-use-distributed-optimizer"):
        prepare("pretrain", [Layer("test", options)], 2)
