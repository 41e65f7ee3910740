# SPDX-License-Identifier: Apache-2.0
"""Verification finds a single wrong bit, and a conversion that does not verify leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink.ckpt_convert import blocks, convert, open_checkpoint
from modellink.ckpt_convert.verify import compare
from modellink.kernels.errors import InternalError, ModelLinkError

Make = Callable[..., Path]


def test_one_wrong_bit_is_found(make_model: Make, tmp_path: Path) -> None:
    source = make_model("qwen2")
    convert(source, tmp_path / "copy", to="hf")
    tensors = load_file(tmp_path / "copy/model.safetensors")
    assert compare(open_checkpoint(source), open_checkpoint(tmp_path / "copy"), show=False) == 31
    tensors["model.layers.2.self_attn.v_proj.bias"].view(torch.int32)[5] ^= 1
    save_file(tensors, tmp_path / "copy/model.safetensors")
    with pytest.raises(InternalError, match=r"decoder.layers.2.self_attention.linear_qkv.bias differs"):
        compare(open_checkpoint(source), open_checkpoint(tmp_path / "copy"), show=False)


def test_numbers_that_do_not_equal_themselves_are_equal_bits(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    tensors["model.norm.weight"][1] = -0.0
    save_file(tensors, source / "model.safetensors")
    assert convert(source, tmp_path / "mc", to="megatron-core", verify=True).verified == 27


def test_an_output_that_does_not_verify_never_appears(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is broken on purpose: it drops the last value of each tensor."""
    def lossy(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        tensor.view(-1)[-1] = 0
        return tensor

    monkeypatch.setattr(blocks, "cast", lossy)
    with pytest.raises(InternalError, match="differs"):
        convert(make_model("llama"), tmp_path / "mc", to="megatron-core", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_another_model_is_not_compared(make_model: Make) -> None:
    first, second = make_model("llama"), make_model("llama", name="second", intermediate_size=42)
    with pytest.raises(ModelLinkError, match=r"ffn_hidden_size is 36 in .* and 42 in"):
        compare(open_checkpoint(first), open_checkpoint(second))
