# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: random weights that differ everywhere, or a run to resume, but never another run."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from ranks import beside

from modellink.core.prepare.prepare import prepare
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer

training, MODELS = beside(__file__, "test_training"), beside(__file__, "models")


def first_weights(layouts: list[dict[str, int]]) -> list[list[tuple[str, list[float]]]]:
    """On a rank: of each layout the first numbers of every matrix of its layers, with their global names."""
    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core import launch, processes
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    found = []
    for sizes in layouts:
        layout = ParallelLayout(**sizes)
        processes.join(find("cpu"), layout, seed=1)
        spec = ModelSpec(num_layers=8, hidden_size=16, num_attention_heads=4, vocab_size=64, max_position_embeddings=32,
                         num_experts=3, moe_router_topk=2)
        models = build_models(spec, BuildSettings(layout=layout))
        matrices = [(f"{launch.rank()} {chunk} {name}", parameter) for chunk, model in enumerate(models)
                    for name, parameter in model.named_parameters() if parameter.dim() > 1]
        found.append([(name, matrix.flatten()[:4].tolist()) for name, matrix in matrices])
    return found


def test_no_two_layers_begin_with_the_same_weights(pools):
    for of_layout in zip(*pools(4)(first_weights, layouts=[{"pp": 4}, {"pp": 2, "vpp": 2, "dp": 2}]), strict=True):
        ranks = of_layout[::2] if of_layout[0][0][1] == of_layout[1][0][1] else of_layout  # data-parallel ranks are alike
        numbers = [tuple(values) for rank in ranks for _, values in rank]
        assert len(set(numbers)) == len(numbers) > 50


def printed_by(options: dict[str, Any]) -> str:
    """On a rank: what a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        training.train(options)
    return said.getvalue()


@pytest.fixture
def texts(tiny, corpus) -> dict[str, Any]:
    return training.OPTIONS | {"load": str(tiny), "data_path": (str(corpus),), "lr_warmup_iters": 0}


@pytest.fixture
def saved(pools, texts, tmp_path) -> Path:
    """The folder of a run of two iterations."""
    save = tmp_path / "saved"
    pools(1)(training.train, options=texts | {"save": str(save), "exit_interval": 2})
    return save


def settle(options: dict[str, Any]) -> Any:
    return prepare("pretrain", [Layer("test", {name: value for name, value in options.items() if value is not None})], 1)


def test_a_folder_that_holds_another_run_is_not_written_into(texts, saved):
    with pytest.raises(ModelLinkError, match="contains iter_0000002 of another run, and this run starts at iteration 0"):
        settle(texts | {"save": str(saved)})
    with pytest.raises(ModelLinkError, match="of another run"):
        settle(texts | {"load": str(saved), "finetune": True, "save": str(saved)})
    settle(texts | {"load": str(saved), "save": str(saved)})
    settle(texts | {"load": str(saved), "finetune": True, "save": str(saved.with_name("other"))})


def test_one_command_starts_a_run_and_goes_on_with_it(pools, texts, saved, tmp_path):
    command = texts | {"save": str(tmp_path / "run"), "auto_resume": True, "exit_interval": 3}
    first, second = (pools(1)(training.train, options=command)[0] for _ in range(2))
    assert ([step[0] for step in first], [step[0] for step in second]) == ([1, 2, 3], [1, 2, 3, 4, 5])
    assert second[:3] == first
    assert settle(command | {"save": str(tmp_path / "new")}).resumed is None


def test_the_folder_to_save_in_may_be_loaded_before_it_holds_anything(texts, saved, tmp_path):
    model = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 131, "max_position_embeddings": 64,
             "model_type_hf": "llama"}
    new = str(tmp_path / "new")
    assert settle(texts | model | {"load": new, "save": new}).source is None
    with pytest.raises(ModelLinkError, match="the checkpoint to load is missing"):
        settle(texts | model | {"load": new, "save": str(tmp_path / "other")})
    assert settle(texts | {"load": str(saved), "save": str(saved)}).resumed == saved / "iter_0000002"


def test_a_run_of_another_kind_is_not_continued(texts, saved, tmp_path):
    for field in ("input_ids", "attention_mask", "labels"):
        for suffix in (".idx", ".bin"):
            (tmp_path / f"chats_packed_{field}_document{suffix}").touch()
    tuned = texts | {"load": str(saved), "data_path": (str(tmp_path / "chats"),), "is_instruction_dataset": True}
    with pytest.raises(ModelLinkError, match="of a run of pretrain, this is sft"):
        settle(tuned)
    assert settle(tuned | {"finetune": True}).resumed is None


def test_what_changes_the_order_of_the_data_is_said(pools, texts, saved):
    (said,) = pools(1)(printed_by, options=texts | {"load": str(saved), "seed": 8, "exit_interval": 3})
    assert "note: seed was 7 and is 8" in said and said.count("in another order") == 1
    (said,) = pools(1)(printed_by, options=texts | {"load": str(saved), "train_iters": 2, "override_opt_param_scheduler": True})
    assert "note: all 2 iterations are done" in said and "in another order" not in said


def test_what_goes_on_by_itself_takes_all_of_its_run(texts, saved):
    checkpoint = settle(texts | {"save": str(saved), "auto_resume": True, "load_optim": False, "load_rng": False}).checkpoint
    assert checkpoint.load == saved and checkpoint.load_optim and checkpoint.load_rng


def test_a_run_keeps_its_batch_and_counts_what_it_has_taken(pools, texts, saved):
    """Two iterations of 4 samples are done."""
    given = texts | {"load": str(saved), "global_batch_size": None, "override_opt_param_scheduler": True}
    assert settle(given).data.global_batch_size == 4
    assert settle(given | {"global_batch_size": 2}).data.global_batch_size == 2
    (said,) = pools(1)(printed_by, options=given | {"global_batch_size": 2, "lr_warmup_iters": 0})
    assert "note: the global batch size was 4 and is 2" in said
    counted = given | {"train_iters": None, "save": str(saved.with_name("counted"))}
    pools(1)(printed_by, options=counted | {"load": texts["load"], "train_samples": 8, "global_batch_size": 4})
    goes_on = {"load": counted["save"], "train_samples": 18, "global_batch_size": 2}
    assert settle(counted | goes_on).optimizer.train_iters == 7


def test_a_checkpoint_can_learn_longer_sequences(texts, tmp_path):
    longer = {"seq_length": 100, "max_position_embeddings": 128}
    assert settle(texts | longer).spec.max_position_embeddings == 128
    assert settle(texts | {"max_position_embeddings": 32}).spec.max_position_embeddings == 64
    MODELS.make("gpt2", tmp_path)
    with pytest.raises(ModelLinkError, match="--max-position-embeddings is 128 in test and 64 in the checkpoint"):
        settle(texts | {"load": str(tmp_path / "weights")} | longer)


def timeout(minutes: int) -> float:
    """On a rank: the minutes a collective of its tensor-parallel group may take."""
    import torch
    from megatron.core import parallel_state

    from modellink.core import processes
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(tp=2), seed=1)
    processes._end_groups()
    processes.make_groups(ParallelLayout(tp=2), timeout_minutes=minutes)
    group = parallel_state.get_tensor_model_parallel_group()
    found = group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60
    processes._end_groups()
    processes._groups_of = None
    return found


def test_every_group_has_the_timeout(pools):
    assert pools(2)(timeout, minutes=7) == [7.0, 7.0]


@pytest.mark.parametrize(("values", "flag"), [
    ({"seed": "-1"}, "--seed"), ({"split": "0,100,0"}, "--split"), ({"split": "nan,1"}, "--split"), ({"split": "inf"}, "--split"),
    ({"save": "file/below"}, "--save")])
def test_what_cannot_work_is_refused_before_the_start(tmp_path, values, flag):
    from modellink.core.config import CheckpointConfig
    from modellink.core.prepare.start import Start, _check_save
    from modellink.core.run import CONFIGS
    from modellink.kernels.options import Layer, resolve

    (tmp_path / "file").touch()
    if "save" in values:
        values = {"save": str(tmp_path / values["save"])}
    values = {"lr": "1e-3", "train_iters": "1"} | values
    with pytest.raises(ModelLinkError) as caught:
        _check_save(resolve(tuple(CONFIGS.values()), Layer("test", values))[CheckpointConfig], Start())
    assert flag in str(caught.value)
