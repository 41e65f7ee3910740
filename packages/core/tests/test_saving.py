# SPDX-License-Identifier: Apache-2.0
"""What a run saves: whole for every architecture, in files of the original too; and what it starts from."""

from __future__ import annotations

import contextlib
import io
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside

MODELS, PARITY = beside(__file__, "models"), beside(__file__, "test_parity")
train = beside(__file__, "test_training").train
OPTIONS = {"train_iters": 3, "lr": 1e-5, "lr_warmup_iters": 0, "global_batch_size": 2}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}


SAME = ("llama llama3 tied", "internlm2: internlm2 dynamic", "minicpm: minicpm-moe-8x2b")
"""Models that differ from others in what they compute and not in the weights they have."""


@pytest.mark.parametrize("case", [case for case in PARITY.VARIED if case not in SAME])
def test_every_weight_is_saved_and_goes_on(pools, corpus, tmp_path, case):
    from modellink.ckpt_convert import convert, open_checkpoint

    MODELS.make(case, tmp_path)
    texts: dict[str, Any] = OPTIONS | {"load": str(tmp_path / "weights"), "data_path": (str(corpus),)}
    longest = open_checkpoint(tmp_path / "weights").spec.max_position_embeddings
    texts["seq_length"] = min(24, longest)
    straight = pools(1)(train, options=texts)[-1]
    pools(2)(train, options=texts | TP2 | {"save": str(tmp_path / "saved"), "exit_interval": 2})
    resumed = pools(2)(train, options=texts | PP2 | {"load": str(tmp_path / "saved")})[-1]
    assert [step[2] for step in resumed] == pytest.approx([straight[2][2]], rel=1e-5)

    convert(tmp_path / "saved", tmp_path / "back", to="hf")
    before, after = (open_checkpoint(Path(tmp_path / name)) for name in ("weights", "back"))
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        rows = [range(tensor.shape[0])]
        moved = (after.read(name, rows, 0) - before.read(name, rows, 0)).abs().max()
        assert moved < 1e-3, name  # two small steps, not random numbers
    assert any(not torch.equal(before.read(name, [range(tensor.shape[0])], 0), after.read(name, [range(tensor.shape[0])], 0))
               for name, tensor in before.tensors.items())


@pytest.mark.parametrize(("form", "case", "layout", "names"), [
    ("megatron-legacy", "llama tied", TP2, ["mp_rank_00", "mp_rank_01"]),
    ("megatron-core", "mixtral", PP2 | {"num_layers_per_virtual_pipeline_stage": 1}, ["mp_rank_00_000", "mp_rank_00_001"])])
def test_weights_are_saved_in_files_of_the_original_too(pools, corpus, tmp_path, form, case, layout, names):
    """They equal a conversion of the checkpoint, and the run resumes from the same folder."""
    from modellink.ckpt_convert import convert, open_checkpoint

    MODELS.make(case, tmp_path)
    texts = OPTIONS | layout | {"data_path": (str(corpus),), "seq_length": 24}
    straight = pools(2)(train, options=texts | {"load": str(tmp_path / "weights")})[-1]
    pools(2)(train, options=texts | {"load": str(tmp_path / "weights"), "save": str(tmp_path / "a"), "exit_interval": 2,
                                     "save_format": form, "async_save": True})
    folder = tmp_path / "a/iter_0000002"
    assert sorted(path.name for path in folder.glob("mp_rank_*")) == names
    assert pools(2)(train, options=texts | {"load": str(tmp_path / "a")})[-1] == straight[2:]

    (tmp_path / "theirs").mkdir()
    for name in names:  # what the original's tools look at: these folders and the tracker
        shutil.copytree(folder / name, tmp_path / "theirs/iter_0000002" / name)
    (tmp_path / "theirs/latest_checkpointed_iteration.txt").write_text("2")
    assert form.replace("m", "M", 1).replace("-c", "-C").replace("-l", "-L") in open_checkpoint(
        tmp_path / "theirs", hf=tmp_path / "weights").describe()
    for source in ("theirs", "a"):
        convert(tmp_path / source, tmp_path / f"{source} hf", to="hf", hf=tmp_path / "weights")
    assert (tmp_path / "theirs hf/model.safetensors").read_bytes() == (tmp_path / "a hf/model.safetensors").read_bytes()

    # as a source they are weights alone, also as a `release`
    (tmp_path / "theirs/iter_0000002").rename(tmp_path / "theirs/release")
    (tmp_path / "theirs/latest_checkpointed_iteration.txt").write_text("release")
    from_theirs = texts | {"load": str(tmp_path / "theirs"), "tokenizer_name_or_path": str(tmp_path / "weights")}
    (_, text), (resumed, _) = pools(2)(heard, options=from_theirs)
    assert "note: only weights are loaded from" in text and "are not read, and training starts at iteration 0" in text
    assert resumed[0][:2] == (1, 2) and resumed[0][2] != straight[0][2]
    assert resumed == pools(2)(train, options=texts | {"load": str(tmp_path / "a"), "finetune": True})[-1]


DISTRIBUTED = {"use_distributed_optimizer": True}
EP2 = {"expert_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}


@pytest.mark.parametrize(("before", "after"), [
    (EP2 | DISTRIBUTED, TP2 | DISTRIBUTED), (TP2 | DISTRIBUTED, EP2 | DISTRIBUTED), (EP2, PP2),
    (CP2 | DISTRIBUTED, EP2 | DISTRIBUTED),
    (EP2 | DISTRIBUTED, {"nproc_per_node": 1} | DISTRIBUTED)])
def test_the_optimizer_of_experts_goes_on_at_another_layout(pools, corpus, mixtral, tmp_path, before, after):
    """The second iteration after the change is of weights that the loaded moments have moved."""
    texts = OPTIONS | {"data_path": (str(corpus),), "seq_length": 24, "train_iters": 5, "lr": 3e-3}
    weights, straight = mixtral(texts)
    pools(2)(train, options=texts | before | {"load": weights, "save": str(tmp_path), "exit_interval": 3})
    steps = pools(after.get("nproc_per_node", 2))(train, options=texts | after | {"load": str(tmp_path)})[-1]
    assert [step[:2] for step in steps] == [(4, 8), (5, 10)]
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in straight[3:]], rel=3e-6)
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in straight[3:]], rel=1e-4)


@pytest.fixture(scope="module")
def mixtral(pools, tmp_path_factory):
    """`mixtral(options)`: a mixture of experts and its run on one rank."""
    @cache
    def go(folder: Path, options: Any) -> tuple[str, Any]:
        MODELS.make("mixtral", folder)
        return str(folder / "weights"), pools(1)(train, options=dict(options) | {"load": str(folder / "weights")})[-1]
    folder = tmp_path_factory.mktemp("mixtral")
    return lambda options: go(folder, tuple(options.items()))


def heard(options: dict[str, Any]) -> tuple[list[tuple[int, int, float, float]], str]:
    """On a rank: the steps of a run and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        steps = train(options)
    return steps, printed.getvalue()
