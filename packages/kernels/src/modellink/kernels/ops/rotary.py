"""Rotary position embedding (Su et al. 2021), the half-split form: dimension i is paired with i + dim / 2.

The op turns heads by given angles; `inverse_frequencies` says by how much a position turns each pair, with the published
ways to stretch that for longer sequences.
"""

from __future__ import annotations

import math
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


def inverse_frequencies(dim: int, base: float, *, scaling: str | None = None, factor: float = 1.0, low_freq_factor: float = 1.0,
                        high_freq_factor: float = 4.0, original_length: int | None = None) -> Tensor:
    """[dim / 2] angles a position, in fp32.

    Args:
        base: theta; pair i turns by base^(-2i / dim).
        scaling: None, or `llama3` (Llama 3.1's recipe): waves longer than `original_length` / `low_freq_factor` are stretched
            by `factor`, those shorter than `original_length` / `high_freq_factor` kept, those between blended.
    """
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling is None:
        return frequencies
    assert scaling == "llama3" and original_length is not None  # ModelSpec knows no other
    turns = original_length * frequencies / (2 * math.pi)  # how often a wave fits into the original length
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)
