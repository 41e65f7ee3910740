"""Frozen linears held in 4 or 8 bits, as QLoRA trains adapters (Dettmers et al. 2023): made whole for each product.

bitsandbytes does the numbers (extra `qlora`; on CPU and CUDA): NF4 in blocks of 64 with absolute maxima in 8 bits, or its dynamic
8-bit format in blocks of 256. Backward makes the weight whole again instead of keeping it, so that no whole one outlives its
product. Embedding, head and norms stay as they are. Each rank rounds its own part: at another layout other numbers share a block.
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
NF4_BLOCK, INT8_BLOCK = 64, 256  # numbers that share a scale


def library() -> Any:
    """bitsandbytes' functions; it looks for a kernel package it does not need here, and says so at length."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as it is held: `packed` numbers and the `state` that makes them whole."""

    packed: Tensor
    state: Any
    form: Form
    shape: torch.Size

    def whole(self) -> Tensor:
        """The matrix, in the dtype it came in."""
        f = library()
        made: Tensor = f.dequantize_4bit(self.packed, self.state) if self.form == "nf4" else (
            f.dequantize_blockwise(self.packed, self.state))
        return made.to(self.state.dtype)

    @property
    def nbytes(self) -> int:
        """Of numbers and scales."""
        nested = self.state.state2.absmax.nbytes if self.state.nested else 0
        return int(self.packed.nbytes + self.state.absmax.nbytes + nested)


def hold(weight: Tensor, form: Form) -> QuantizedWeight:
    """`weight` rounded to the form."""
    f = library()
    made = f.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True) if form == "nf4" else (
        f.quantize_blockwise(weight, blocksize=INT8_BLOCK))
    packed, state = made
    return QuantizedWeight(packed, state, form, weight.shape)


class Quantized(nn.Module):
    """What the quantised form of every linear shares: its weight is there during `forward` alone."""

    held: QuantizedWeight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.weight = self.held.whole()
        place = self.weight.untyped_storage().data_ptr()

        def keep(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
            if saved.untyped_storage().data_ptr() == place:
                return saved.shape, saved.stride()
            return saved.detach()  # it may be an output, which must not hold its own graph

        def again(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.held.whole().as_strided(*kept)
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
    """Hold the frozen linears of the layers of these model chunks in `form`, in place."""
    for model in models:
        chunk: Any = bare(model)
        for module in chunk.decoder.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and not module.weight.requires_grad:
                linear: Any = module
                linear.held = hold(linear.weight.data, form)
                del linear.weight
                kind: Any = type(linear)
                specialize(linear, _quantized(kind))
