# SPDX-License-Identifier: Apache-2.0
"""transformers loads what we write: configuration, tokenizer, weights, and the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink.ckpt_convert import convert
from modellink.kernels.parallel import ParallelLayout

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is no need of this package")
Make = Callable[..., Path]


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(12).view(1, 12)).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_way_there_and_back(family: str, tied: bool, make_model: Make, tmp_path: Path) -> None:
    source = make_model(family, hidden_size=24, tie_word_embeddings=tied)
    convert(source, tmp_path / "mc", to="megatron-core", layout=ParallelLayout(pp=2))
    convert(tmp_path / "mc", tmp_path / "back", to="hf", max_shard_bytes=30_000)
    assert torch.equal(logits(source), logits(tmp_path / "back"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_configuration_that_never_was(family: str, make_model: Make, tmp_path: Path) -> None:
    """A model trained from scratch has a manifest but no config.json, which is made from ModelSpec."""
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 16}
    source = make_model(family, hidden_size=24, rope_scaling=scaling)
    convert(source, tmp_path / "mc", to="megatron-core")
    (tmp_path / "mc/hf/config.json").unlink()
    convert(tmp_path / "mc", tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["rope_scaling"] == scaling
    assert torch.equal(logits(source), logits(tmp_path / "back"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_configuration_saved_by_transformers(family: str, make_model: Make, tmp_path: Path) -> None:
    """Whatever spelling the installed version writes means the same."""
    source = make_model(family, hidden_size=24, dtype=torch.bfloat16, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert convert(tmp_path / "saved", tmp_path / "mc", to="megatron-core", verify=True).plan.source.spec == (
        convert(source, tmp_path / "mc2", to="megatron-core").plan.source.spec)
