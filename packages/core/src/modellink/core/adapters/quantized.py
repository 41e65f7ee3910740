# SPDX-License-Identifier: Apache-2.0
"""Frozen linears in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), dequantized for each product.

bitsandbytes quantizes (extra `qlora`; CPU and CUDA): NF4 in blocks of 64 with 8-bit absolute maxima, or its dynamic
8-bit format in blocks of 256. The backward pass dequantizes again, so that no full weight outlives its product.
Embedding, output layer and norms are not quantized. Each rank quantizes its own shard, so the blocks depend on the
layout.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from modellink.core.model.load import bare
from modellink.core.model.specialize import specialize

Form = Literal["nf4", "int8"]
NF4_BLOCK, INT8_BLOCK = 64, 256  # numbers per scale


def library() -> Any:
    """bitsandbytes' functions, without its warnings about an optional kernel package."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: `packed` numbers and the `state` to dequantize them."""

    packed: Tensor
    state: Any
    form: Form
    shape: torch.Size

    def dequantized(self) -> Tensor:
        """The dequantized matrix in its original dtype."""
        f = library()
        made: Tensor = f.dequantize_4bit(self.packed, self.state) if self.form == "nf4" else (
            f.dequantize_blockwise(self.packed, self.state))
        return made.to(self.state.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        nested = self.state.state2.absmax.nbytes if self.state.nested else 0
        return int(self.packed.nbytes + self.state.absmax.nbytes + nested)


def quantized(weight: Tensor, form: Form) -> QuantizedWeight:
    """Quantize a weight."""
    f = library()
    made = f.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True) if form == "nf4" else (
        f.quantize_blockwise(weight, blocksize=INT8_BLOCK))
    packed, state = made
    return QuantizedWeight(packed, state, form, weight.shape)


class Quantized(nn.Module):
    """Base of all quantized linears: the dequantized weight exists only during `forward`."""

    quantized_weight: QuantizedWeight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.weight = self.quantized_weight.dequantized()
        place = self.weight.untyped_storage().data_ptr()

        def keep(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
            if saved.untyped_storage().data_ptr() == place:
                return saved.shape, saved.stride()
            return saved.detach()  # a saved output must not keep its own graph alive

        def again(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.quantized_weight.dequantized().as_strided(*kept)
        try:
            with saved_tensors_hooks(keep, again):
                return super().forward(*args, **kwargs)
        finally:
            del self.weight


@cache
def _quantized(kind: Any) -> type[nn.Module]:
    return type(f"Quantized{kind.__name__}", (Quantized, kind), {})


@torch.no_grad()
def quantize(models: Sequence[nn.Module], form: Form) -> None:
    """Quantize the frozen linears of the layers of these model chunks in place."""
    for model in models:
        chunk: Any = bare(model)
        for module in chunk.decoder.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and not module.weight.requires_grad:
                linear: Any = module
                linear.quantized_weight = quantized(linear.weight.data, form)
                del linear.weight
                kind: Any = type(linear)
                specialize(linear, _quantized(kind))
