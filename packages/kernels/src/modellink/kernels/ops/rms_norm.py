"""Root-mean-square norm (Zhang and Sennrich 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight` * x / sqrt(mean(x^2) + `epsilon`) over the last dimension; the mean is taken in fp32."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: a weight of {list(weight.shape)} for rows of {x.size(-1)}")
    return FORMS.get(x.device.type, plain)(x, weight, epsilon)


def plain(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def cuda(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, epsilon)


def npu(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    result: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]
    return result


FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"cuda": cuda, "npu": npu}
