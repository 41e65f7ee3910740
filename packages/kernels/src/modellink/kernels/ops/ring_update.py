# SPDX-License-Identifier: Apache-2.0
"""Combining attention over two sets of keys (as in flash attention, Dao et al. 2022): the step of ring
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of


def ring_update(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention over both sets of keys, from the attention over each.

    Args:
        out, new_out: [seq, batch, heads, dim], fp32.
        lse, new_lse: [seq, batch, heads], logarithm of the sum of exponentiated scores; -inf if no key was
            seen.
    """
    if not (out.shape == new_out.shape and lse.shape == new_lse.shape == out.shape[:3]):
        raise ValueError(f"ring_update: outputs of {list(out.shape)} and {list(new_out.shape)} with sums of "
                         f"{list(lse.shape)} "
                         f"and {list(new_lse.shape)}")
    if not out.dtype == new_out.dtype == lse.dtype == new_lse.dtype == torch.float32:
        raise ValueError(f"ring_update: {out.dtype}, {lse.dtype}, {new_out.dtype} and {new_lse.dtype} are "
                         f"not all fp32")
    return form_of("ring_update", out.device.type, FORMS, plain)(out, lse, new_out, new_lse)


def plain(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.logaddexp(lse, new_lse)
    finite = joined.clamp(min=torch.finfo(joined.dtype).min)  # -inf minus -inf would be NaN
    weight, new_weight = (lse - finite).exp(), (new_lse - finite).exp()
    return out * weight.unsqueeze(-1) + new_out * new_weight.unsqueeze(-1), joined


_LOWEST = torch.finfo(torch.float32).min


class _Npu(torch.autograd.Function):
    """The fused op combines maxima and sums of exponentials: it gets our logarithm as the maximum, with a sum
    of one. It has no derivative; the backward pass is the plain form's."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, new_out: Tensor,
                new_lse: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out, lse, new_out, new_lse)
        # [batch, heads, seq, 8], eight equal values; -inf minus -inf would be NaN
        largest, new_largest = (x.clamp(min=_LOWEST).permute(1, 2, 0).unsqueeze(-1).repeat(1, 1, 1, 8)
                                for x in (lse, new_lse))
        ones = torch.ones_like(largest)
        joined, largest, total = torch.ops.npu.npu_ring_attention_update(
            out.flatten(2), largest, ones, new_out.flatten(2), new_largest, ones, input_layout="SBH")
        sums = (largest[..., 0] + total[..., 0].log()).permute(2, 0, 1)
        return joined.view_as(out), sums.masked_fill(sums == _LOWEST, float("-inf"))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(plain(*inputs), inputs, gradients)


def npu(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    if not hasattr(torch.ops.npu, "npu_ring_attention_update"):  # not every version of torch_npu has it
        return plain(out, lse, new_out, new_lse)
    result: tuple[Tensor, Tensor] = _Npu.apply(out, lse, new_out, new_lse)
    return result


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {"npu": npu}
