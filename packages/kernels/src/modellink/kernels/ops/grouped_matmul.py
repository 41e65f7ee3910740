# SPDX-License-Identifier: Apache-2.0
"""Multiplying consecutive groups of rows, each with its own matrix: the products of a mixture of experts.

The fused forms are one kernel for all groups. CUDA's kernel needs the matrices in one block: they are used in
place if they already are (experts are created so), and copied together for the call otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of


def grouped_matmul(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Multiply x [rows, in], the first counts[0] rows with weights[0] [out, in] and so on -> [rows, out]."""
    if len(weights) != len(counts) or sum(counts) != x.size(0):
        raise ValueError(f"grouped_matmul: groups of {list(counts)} for {x.size(0)} rows and {len(weights)} "
                         f"matrices")
    if x.dim() != 2 or any(weight.shape != weights[0].shape
                           for weight in weights) or weights[0].size(1) != x.size(1):
        raise ValueError(f"grouped_matmul: rows of {x.size(-1)} for matrices of "
                         f"{[list(weight.shape) for weight in weights]}")
    return form_of("grouped_matmul", x.device.type, FORMS, plain)(x, weights, counts)


def plain(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    parts = x.split(list(counts))
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])


class _Grouped(torch.autograd.Function):
    """Autograd around `multiply(x, matrices, counts)` and `outer(x, gradient, counts)`."""

    @staticmethod
    def forward(ctx: Any, multiply: Any, outer: Any, counts: Sequence[int], x: Tensor,
                *weights: Tensor) -> Tensor:
        ctx.multiply, ctx.outer, ctx.counts = multiply, outer, counts
        ctx.save_for_backward(x, *weights)
        out: Tensor = multiply(x, weights, counts, True)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_x = ctx.multiply(gradient, weights, ctx.counts, False) if ctx.needs_input_grad[3] else None
        learned = any(ctx.needs_input_grad[4:])
        return None, None, None, of_x, *(ctx.outer(gradient, x, ctx.counts) if learned
                                         else [None] * len(weights))


def as_block(weights: Sequence[Tensor]) -> Tensor:
    """Return [groups, out, in]: a view if the matrices are consecutive in one storage, otherwise a copy."""
    first, size = weights[0], weights[0].numel()
    storage, start = first.untyped_storage()._cdata, first.storage_offset()
    if all(weight.untyped_storage()._cdata == storage and weight.storage_offset() == start + number * size
           and weight.is_contiguous() for number, weight in enumerate(weights)):
        return first.as_strided((len(weights), *first.shape), (size, *first.stride()), start)
    return torch.stack(list(weights))


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _multiply(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int], transposed: bool) -> Tensor:
    block = as_block(weights)
    return torch._grouped_mm(x, block.transpose(1, 2) if transposed else block, offs=_ends(counts, x.device))


def _outer(gradient: Tensor, x: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    return torch._grouped_mm(gradient.t(), x, offs=_ends(counts, x.device)).unbind()


def torch_fused(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Use torch's kernel, which supports bf16 with rows of a multiple of 16 bytes; otherwise the plain form."""
    if x.dtype != torch.bfloat16 or any(size % 8 for size in weights[0].shape) or not x.size(0):
        return plain(x, weights, counts)
    out: Tensor = _Grouped.apply(_multiply, _outer, counts, x.contiguous(), *weights)
    return out


def _npu_multiply(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int], transposed: bool) -> Tensor:
    block = as_block(weights)
    out: Tensor = torch.ops.npu.npu_grouped_matmul(
        [x], [block.transpose(1, 2) if transposed else block], group_list=_ends(counts, x.device).long(),
        split_item=3, group_type=0, group_list_type=0)[0]
    return out


def _npu_outer(gradient: Tensor, x: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    out: Tensor = torch.ops.npu.npu_grouped_matmul(
        [gradient.t()], [x], group_list=_ends(counts, x.device).long(), split_item=3, group_type=2,
        group_list_type=0)[0]
    return out.unbind()


def npu(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    if not x.size(0):
        return plain(x, weights, counts)
    out: Tensor = _Grouped.apply(_npu_multiply, _npu_outer, counts, x.contiguous(), *weights)
    return out


FORMS: dict[str, Callable[[Tensor, Sequence[Tensor], Sequence[int]], Tensor]] = {"cuda": torch_fused,
                                                                                 "npu": npu}
