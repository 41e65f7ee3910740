"""Rotary position embedding (Su et al. 2021), the half-split form: dimension i is paired with i + dim / 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `cos.size(-1)` dimensions of every head and leave the others.

    Args:
        x: [seq, batch, heads, dim].
        cos, sin: [seq, batch or 1, 1, rotated dim], each angle twice (once per half).
    """
    size = cos.size(-1)
    form = FORMS.get(x.device.type, plain)
    if size == x.size(-1):
        return form(x, cos, sin)
    return torch.cat([form(x[..., :size], cos, sin), x[..., size:]], dim=-1)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_rotary_mul(x, cos, sin)
    return result


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"npu": npu}
