# SPDX-License-Identifier: Apache-2.0
"""Matrix products joined with a collective over tensor-parallel ranks (MC2 on Ascend).

If ranks hold parts of the rows, `all_gather_matmul` multiplies the rows of all ranks, and
`matmul_reduce_scatter` sums the products of all ranks and leaves each rank its rows; each is the other's
gradient. If all ranks hold every row, `matmul_all_reduce` sums the products. The fused forms overlap the
transfer with the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Limits of torch_npu: ranks from its host checks, dtypes and inner sizes from its documentation of the three
# ops.
NPU_RANKS, NPU_RANKS_ALL_REDUCE = (2, 4, 8, 16, 32), (2, 4, 8)
NPU_INNER = range(256, 65535)
NPU_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Forms:
    """How x [rows, in] and a matrix [in, out] are multiplied over a group.

    Attributes:
        gather: the rows of all ranks times the matrix, and these rows.
        scatter: this rank's rows of the sum of the products.
        reduce: the sum of the products.
    """

    gather: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
    scatter: Callable[[Tensor, Tensor, Any], Tensor]
    reduce: Callable[[Tensor, Tensor, Any], Tensor]


def all_gather_matmul(x: Tensor, weight: Tensor, group: Any, forms: Forms | None = None) -> Tensor:
    """Gather rows and multiply: x [rows, in] of this rank, weight [out, in] -> [ranks x rows, out], in the
    order of ranks."""
    _check("all_gather_matmul", x, weight)
    out: Tensor = _AllGatherMatmul.apply(x, weight, group, forms or FORMS.get(x.device.type, PLAIN))
    return out


def matmul_reduce_scatter(x: Tensor, weight: Tensor, group: Any, forms: Forms | None = None) -> Tensor:
    """Multiply and sum over ranks: x [ranks x rows, in], weight [out, in] -> [rows, out], this rank's rows of
    the sum."""
    _check("matmul_reduce_scatter", x, weight)
    if x.size(0) % group.size():
        raise ValueError(f"matmul_reduce_scatter: {x.size(0)} rows for {group.size()} ranks")
    out: Tensor = _MatmulReduceScatter.apply(x, weight, group, forms or FORMS.get(x.device.type, PLAIN))
    return out


def matmul_all_reduce(x: Tensor, weight: Tensor, group: Any, forms: Forms | None = None) -> Tensor:
    """Multiply and sum over ranks: x [rows, in], weight [out, in] -> [rows, out]; the gradient is the same on
    all ranks."""
    _check("matmul_all_reduce", x, weight)
    out: Tensor = _MatmulAllReduce.apply(x, weight, group, forms or FORMS.get(x.device.type, PLAIN))
    return out


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1) or x.dtype != weight.dtype:
        raise ValueError(f"{name}: {x.dtype} rows of {list(x.shape)} for a {weight.dtype} matrix of "
                         f"{list(weight.shape)}")


class _AllGatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any, forms: Forms) -> Tensor:
        ctx.group, ctx.forms = group, forms
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return forms.gather(x, weight.t(), group)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = ctx.forms.scatter(gradient, weight, ctx.group) if ctx.needs_input_grad[0] else None
        of_weight = gradient.t() @ _gathered(x, ctx.group) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None


class _MatmulReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any, forms: Forms) -> Tensor:
        ctx.group, ctx.forms = group, forms
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return forms.scatter(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, gathered = ctx.forms.gather(gradient, weight, ctx.group)
        return of_x, gathered.t() @ x if ctx.needs_input_grad[1] else None, None, None


class _MatmulAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any, forms: Forms) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return forms.reduce(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_x, gradient.t() @ x if ctx.needs_input_grad[1] else None, None, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    gathered = x.new_empty(group.size() * x.size(0), x.size(1))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def plain_gather(x: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    gathered = _gathered(x, group)
    return gathered @ matrix, gathered


def plain_scatter(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    product = x @ matrix
    out = product.new_empty(product.size(0) // group.size(), product.size(1))
    dist.reduce_scatter_tensor(out, product, group=group)
    return out


def plain_reduce(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    out = x @ matrix
    dist.all_reduce(out, group=group)
    return out


PLAIN = Forms(plain_gather, plain_scatter, plain_reduce)


def _npu_supports(x: Tensor, group: Any) -> bool:
    return x.dtype in NPU_TYPES and x.size(1) in NPU_INNER and group.size() in NPU_RANKS


def _hcom(group: Any) -> str:
    """Return the name of the HCCL communicator of a group."""
    name: str = group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())
    return name


def npu_gather(x: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    if not _npu_supports(x, group):
        return plain_gather(x, matrix, group)
    out, gathered = torch.ops.npu.npu_all_gather_base_mm(x.contiguous(), matrix, _hcom(group), group.size(),
                                                         bias=None,
                                                      gather_index=0, gather_output=True)
    return out, gathered


def npu_scatter(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    if not _npu_supports(x, group):
        return plain_scatter(x, matrix, group)
    out: Tensor = torch.ops.npu.npu_mm_reduce_scatter_base(x.contiguous(), matrix, _hcom(group), group.size(),
                                                           reduce_op="sum", bias=None)
    return out


def npu_reduce(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    if x.dtype not in NPU_TYPES or group.size() not in NPU_RANKS_ALL_REDUCE or not x.size(0):
        return plain_reduce(x, matrix, group)
    out: Tensor = torch.ops.npu.npu_mm_all_reduce_base(x.contiguous(), matrix, _hcom(group), reduce_op="sum",
                                                       bias=None)
    return out


FORMS: dict[str, Forms] = {"npu": Forms(npu_gather, npu_scatter, npu_reduce)}
