# SPDX-License-Identifier: Apache-2.0
"""Tensors without files: equal to those in the files of a conversion; and the example that fills a running model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import load_state
from tiny_models import make_folder, spec_of

from modellink.ckpt_convert import convert, iter_hf_tensors, iter_megatron_shards
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

EXAMPLE = Path(__file__).parents[1] / "examples/stream_into_model.py"


@pytest.mark.parametrize("model", ["llama tied", "gpt2", "deepseek_v2"])
def test_hugging_face_tensors_of_a_megatron_checkpoint(model: str, tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of(model))
    convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=2, pp=2))
    found = dict(iter_hf_tensors(tmp_path / "mc"))
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert all(tensor.dtype == torch.float32 for _, tensor in iter_hf_tensors(tmp_path / "mc", dtype=torch.float32))


@pytest.mark.parametrize(("model", "layout"), [
    ("llama tied", ParallelLayout(tp=2, pp=2, vpp=2)), ("mixtral", ParallelLayout(tp=2, pp=2, ep=2))])
def test_shards_of_ranks(model: str, layout: ParallelLayout, tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of(model))
    convert(tmp_path / "hf", tmp_path / "mc", to="megatron-core", layout=layout)
    count = 0
    for shard in iter_megatron_shards(tmp_path / "hf", layout):
        folder = f"mp_rank_{shard.tp_rank:02d}_{shard.stage:03d}" + (f"_{shard.expert_rank:03d}" if layout.ep > 1 else "")
        state = load_state(tmp_path / f"mc/iter_0000001/{folder}/model_optim_rng.pt")
        assert torch.equal(state["model" if layout.vpp == 1 else f"model{shard.chunk}"][shard.name], shard.tensor)
        count += 1
    assert count == sum(len(state[key]) for path in tmp_path.rglob("*.pt") for state in [load_state(path)]
                        for key in state if key.startswith("model"))


def test_mistakes_show_before_the_first_tensor(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", *spec_of("llama"))
    with pytest.raises(ModelLinkError, match="does not divide the 4 query groups"):
        iter_megatron_shards(tmp_path / "hf", ParallelLayout(tp=3))
    with pytest.raises(ModelLinkError, match="folder is missing"):
        iter_hf_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [False, True])
def test_the_example_fills_a_running_model(tied: bool, make_model: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is no need of this package")
    source = make_model("llama", hidden_size=24, tie_word_embeddings=tied)
    convert(source, tmp_path / "mg", to="megatron-legacy", layout=ParallelLayout(tp=3, pp=2))
    model: Any = runpy.run_path(str(EXAMPLE))["main"](str(tmp_path / "mg"))
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, transformers.AutoModelForCausalLM.from_pretrained(source)(ids).logits)
