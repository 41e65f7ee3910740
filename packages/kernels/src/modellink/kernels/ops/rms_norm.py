# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norm (Zhang and Sennrich 2019).

On a CPU each step of the plain form is a pass over newly allocated memory; the CPU form needs fewer passes,
in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `weight` * x / sqrt(mean(x^2) + `epsilon`) over the last dimension; the mean is computed in
    fp32."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: a weight of {list(weight.shape)} for rows of {x.size(-1)}")
    return form_of("rms_norm", x.device.type, FORMS, plain)(x, weight, epsilon)


def plain(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def cpu(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    result: Tensor = _InPlace.apply(x, weight, epsilon)
    return result


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        factor = _factor(wide, epsilon)
        ctx.save_for_backward(x, weight, factor)
        normal = wide * factor if wide is x else wide.mul_(factor)
        if weight.dtype != x.dtype:
            return weight * normal.to(x.dtype)
        return normal.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * factor and g = gradient * weight: the weight's gradient is the sum of gradient * n,
        that of x is factor * (g - n * mean(g * n))."""
        x, weight, factor = ctx.saved_tensors
        normal, product = x * factor, gradient.float()
        scale, size = weight.float(), x.size(-1)
        product = product * normal if product is gradient else product.mul_(normal)
        of_weight = product.view(-1, size).sum(0).to(weight.dtype)
        along = (product @ scale).div_(size).unsqueeze(-1)
        torch.mul(gradient, scale, out=product)
        return product.addcmul_(normal, along, value=-1).mul_(factor).to(x.dtype), of_weight, None


def _factor(wide: Tensor, epsilon: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + epsilon) [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.size(-1)).add_(epsilon).rsqrt_()


def cuda(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, epsilon)


def npu(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    result: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]
    return result


FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"cpu": cpu, "cuda": cuda, "npu": npu}
