"""Matrix products joined with a collective over tensor-parallel ranks that hold parts of the rows (MC2 on Ascend).

`all_gather_matmul` multiplies the rows of all ranks, `matmul_reduce_scatter` sums the products of all ranks and leaves each its
rows; each is the other's gradient. The fused forms overlap the transfer with the product. Not here: the all-reduce form, for
ranks that all hold every row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NPU_RANKS = (2, 4, 8, 16, 32)
"""What torch_npu's host checks allow."""


def all_gather_matmul(x: Tensor, weight: Tensor, group: Any) -> Tensor:
    """x [rows, in] of this rank, weight [out, in] -> [ranks x rows, out], the rows in the order of the ranks."""
    out: Tensor = _AllGatherMatmul.apply(x, weight, group)
    return out


def matmul_reduce_scatter(x: Tensor, weight: Tensor, group: Any) -> Tensor:
    """x [ranks x rows, in], weight [out, in] -> [rows, out], this rank's rows of the sum over ranks."""
    out: Tensor = _MatmulReduceScatter.apply(x, weight, group)
    return out


class _AllGatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _forms(x, group)[0](x, weight.t(), group)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = _forms(gradient, ctx.group)[1](gradient.contiguous(), weight, ctx.group) if ctx.needs_input_grad[0] else None
        of_weight = gradient.t() @ _gathered(x, ctx.group) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


class _MatmulReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _forms(x, group)[1](x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, whole = _forms(gradient, ctx.group)[0](gradient.contiguous(), weight, ctx.group)
        return of_x, whole.t() @ x if ctx.needs_input_grad[1] else None, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    whole = x.new_empty(group.size() * x.size(0), x.size(1))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def plain_gather(x: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The rows of all ranks times `matrix` [in, out], and these rows."""
    whole = _gathered(x, group)
    return whole @ matrix, whole


def plain_scatter(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    """This rank's rows of the sum of x @ matrix [in, out] over ranks."""
    product = x @ matrix
    out = product.new_empty(product.size(0) // group.size(), product.size(1))
    dist.reduce_scatter_tensor(out, product, group=group)
    return out


def _hcom(group: Any) -> str:
    """The name of the HCCL communicator of a group."""
    name: str = group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())
    return name


def npu_gather(x: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    out, whole = torch.ops.npu.npu_all_gather_base_mm(x, matrix, _hcom(group), group.size(), bias=None, gather_index=0,
                                                      gather_output=True)
    return out, whole


def npu_scatter(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    out: Tensor = torch.ops.npu.npu_mm_reduce_scatter_base(x, matrix, _hcom(group), group.size(), reduce_op="sum", bias=None)
    return out


Forms = tuple[Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor, Any], Tensor]]
FORMS: dict[str, Forms] = {"npu": (npu_gather, npu_scatter)}


def _forms(x: Tensor, group: Any) -> Forms:
    plain = (plain_gather, plain_scatter)
    return FORMS.get(x.device.type, plain) if group.size() in NPU_RANKS else plain
