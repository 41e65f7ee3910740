# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders with `pytorch_model*.bin`: the same weights as safetensors, and none of their code is executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

Make = Callable[..., Path]


@pytest.fixture
def pickle_it(make_model: Make) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """pickle_it(shards, **changes): a folder whose weights are pickled, and the weights."""

    def make(shards: int = 1, change: Callable[[dict[str, Any]], Any] = lambda state: state, **changes: Any) -> Any:
        folder = make_model("llama", **changes)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if shards == 1:
            torch.save(change(dict(weights)), folder / "pytorch_model.bin")
            return folder, weights
        names = sorted(weights)
        files = {name: f"pytorch_model-{1 + number % shards:05d}-of-{shards:05d}.bin" for number, name in enumerate(names)}
        for file in set(files.values()):
            torch.save(change({name: weights[name] for name in names if files[name] == file}), folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
        return folder, weights

    return make


@pytest.mark.parametrize("shards", [1, 3])
def test_the_way_there_and_back(shards: int, pickle_it: Any, tmp_path: Path) -> None:
    folder, before = pickle_it(shards, dtype=torch.bfloat16)
    convert(folder, tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=3, pp=2), verify=True)
    convert(tmp_path / "mc", tmp_path / "back", to="hf")
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_views_of_one_storage_and_transposes(pickle_it: Any, tmp_path: Path) -> None:
    """Gate and up as slices of one matrix, and a matrix that is stored column by column."""
    def share(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
        state |= zip(names, torch.cat([state[name] for name in names]).chunk(2), strict=True)
        name = "model.layers.1.mlp.down_proj.weight"
        return state | {name: state[name].T.contiguous().T}

    folder, before = pickle_it(1, share)
    convert(folder, tmp_path / "back", to="hf")
    after = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_hostile_file_runs_nothing(pickle_it: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    folder, _ = pickle_it(1, lambda state: state | {"model.norm.weight": Evil()})
    with pytest.raises(ModelLinkError, match=r"1 weight is missing: model.norm.weight"):
        open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_an_incomplete_shard(pickle_it: Any) -> None:
    folder, _ = pickle_it(3)
    path = folder / "pytorch_model-00002-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ModelLinkError, match=r"not a complete torch.save archive[\s\S]*00002-of-00003"):
        open_checkpoint(folder)


def test_an_index_that_points_elsewhere(pickle_it: Any) -> None:
    folder, _ = pickle_it(3)
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(path.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    with pytest.raises(ModelLinkError, match="not a file name of this folder"):
        open_checkpoint(folder)


def test_quantized_weights_are_refused(pickle_it: Any) -> None:
    folder, _ = pickle_it(1, lambda state: state | {"model.norm.weight": torch.zeros(20, dtype=torch.int8)})
    with pytest.raises(ModelLinkError, match=r"stored as int8"):
        open_checkpoint(folder)
