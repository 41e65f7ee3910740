# SPDX-License-Identifier: Apache-2.0
"""Copies of a weight that differ between ranks are named and refused, or the first one is taken."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_folder, spec_of

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.ckpt_convert.verify import differences
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

NORM = "decoder.final_layernorm.weight"
CASES = [
    ("llama", ParallelLayout(tp=2), "mp_rank_01", NORM, NORM),
    ("llama tied", ParallelLayout(pp=2), "mp_rank_00_001", "output_layer.weight", "embedding.word_embeddings.weight"),
    ("llama tied", ParallelLayout(tp=2, pp=2), "mp_rank_01_001", "output_layer.weight", "embedding.word_embeddings.weight"),
    ("mixtral", ParallelLayout(ep=2), "mp_rank_00_001", "decoder.layers.1.self_attention.linear_qkv.weight",
     "decoder.layers.1.self_attention.linear_qkv.weight"),
    ("mixtral", ParallelLayout(tp=2, ep=2), "mp_rank_01_001", "decoder.layers.2.mlp.router.weight",
     "decoder.layers.2.mlp.router.weight")]
"""Model, layout, rank whose weight changes, its name there, and its canonical name."""


def change(path: Path, name: str) -> None:
    with torch.serialization.safe_globals([Namespace]):
        state: dict[str, Any] = torch.load(path)
    state["model"][name].view(-1)[0] += 1
    torch.save(state, path)


@pytest.mark.parametrize(("model", "layout", "rank", "name", "canonical"), CASES)
def test_diverged_copies(model: str, layout: ParallelLayout, rank: str, name: str, canonical: str, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    family, spec = spec_of(model)
    make_folder(tmp_path / "hf", family, spec)
    convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=layout)
    convert(tmp_path / "mc", tmp_path / "same", to="hf")
    (tmp_path / "mc/modellink.json").unlink()
    (tmp_path / "mc/iter_0000001/modellink.complete").unlink()
    change(tmp_path / f"mc/iter_0000001/{rank}/model_optim_rng.pt", name)
    with pytest.raises(ModelLinkError, match=rf"different copies of {canonical}\n[\s\S]*{rank}[\s\S]*--allow-diverged first"):
        convert(tmp_path / "mc", tmp_path / "back", to="hf")
    assert not (tmp_path / "back").exists()
    convert(tmp_path / "mc", tmp_path / "back", to="hf", allow_diverged=True)
    assert f"different copies of {canonical}; the first copy is used" in capsys.readouterr().err
    back = open_checkpoint(tmp_path / "back")
    assert not list(differences(open_checkpoint(tmp_path / "hf"), back, show=False))
