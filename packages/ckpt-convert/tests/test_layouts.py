# SPDX-License-Identifier: Apache-2.0
"""Every family through every kind of layout and back: no bit is lost, and the layout is detected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from states import load_state
from tiny_models import MODELS, make_folder, spec_of

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

LAYOUTS = {
    "tp-pp-vpp": ParallelLayout(tp=2, pp=2, vpp=2), "uneven": ParallelLayout(pp=3, num_layer_list=(1, 2, 1)),
    "tp-pp-ep": ParallelLayout(tp=2, pp=2, ep=2), "pp-ep": ParallelLayout(pp=2, ep=4)}
"""Each dimension is in one of them; test_properties.py draws layouts for models of any kind."""
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS
         if LAYOUTS[layout].ep == 1 or spec_of(model)[1].num_experts]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_there_and_back(model: str, name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    before = make_folder(tmp_path / "hf", *spec_of(model))
    convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=layout)
    assert open_checkpoint(tmp_path / "mc").layout == layout
    convert(tmp_path / "mc", tmp_path / "back", to="hf")
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize(("layout", "folders"), [
    (ParallelLayout(ep=2), {"mp_rank_00_000", "mp_rank_00_001"}),
    (ParallelLayout(tp=2, pp=2, ep=2), {f"mp_rank_0{tp}_00{pp}_00{ep}" for tp in range(2) for pp in range(2) for ep in range(2)}),
])
def test_ranks_hold_their_experts(layout: ParallelLayout, folders: set[str], tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("mixtral"))
    convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=layout)
    root = tmp_path / "mc/iter_0000001"
    assert {path.name for path in root.glob("mp_rank_*")} == folders
    for folder in folders:
        expert_rank, rank = int(folder[-3:]), int(folder[8:10])
        state = load_state(root / folder / "model_optim_rng.pt")
        assert state["args"].expert_model_parallel_size == 2
        first = 2 if layout.pp == 2 and "_001_" in folder else 0
        for layer in range(4 // layout.pp):
            theirs, ours = f"model.layers.{first + layer}.block_sparse_moe.", f"decoder.layers.{layer}.mlp."
            assert torch.equal(state["model"][ours + "router.weight"], before[theirs + "gate.weight"])
            for expert in range(2):  # global expert = local expert + expert rank x experts of a rank
                start = f"{theirs}experts.{expert + 2 * expert_rank}."
                down = before[start + "w2.weight"].chunk(layout.tp, dim=1)[rank]
                gate, up = (before[f"{start}{name}.weight"].chunk(layout.tp)[rank] for name in ("w1", "w3"))
                inside = f"{ours}experts.local_experts.{expert}."
                assert torch.equal(state["model"][inside + "linear_fc2.weight"], down)
                assert torch.equal(state["model"][inside + "linear_fc1.weight"], torch.cat([gate, up]))
            assert not any("local_experts.2." in name for name in state["model"])


def test_a_missing_expert_rank_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of("mixtral"))
    convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=2, pp=2, ep=2))
    (tmp_path / "mc/iter_0000001/mp_rank_01_000_001/model_optim_rng.pt").unlink()
    (tmp_path / "mc/iter_0000001/mp_rank_01_000_001").rmdir()
    (tmp_path / "mc/iter_0000001/modellink.complete").unlink()
    (tmp_path / "mc/modellink.json").unlink()
    with pytest.raises(ModelLinkError, match="rank 1 of pipeline stage 0, expert-parallel rank 1 is missing"):
        open_checkpoint(tmp_path / "mc", hf=tmp_path / "hf")


def test_experts_that_cannot_be_dealt(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of("mixtral"))
    with pytest.raises(ModelLinkError, match="4 experts cannot be split evenly across 3 ranks"):
        convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=ParallelLayout(ep=3))
    make_folder(tmp_path / "dense", *spec_of("llama"))
    with pytest.raises(ModelLinkError, match="without experts cannot have an expert parallel size of 2"):
        convert(tmp_path / "dense", tmp_path / "mc", to="megatron-core", layout=ParallelLayout(ep=2))
