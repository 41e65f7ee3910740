# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021): pairs of dimensions are rotated by an angle that grows with the
position.

The op rotates heads by given angles, with adjacent pairs or pairs half a head apart; `inverse_frequencies`
returns the angle per position of each pair, with the published ways to scale it for longer sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first `cos.size(-1)` dimensions of every head and keep the others.

    Args:
        x: [seq, batch, heads, dim].
        cos, sin: [seq, batch or 1, 1, rotated dim], each angle once per dimension of its pair.
        interleaved: dimension 2i is paired with 2i + 1, not dimension i with i + rotated dim / 2.
    """
    size, seq, batch = cos.size(-1), x.size(0), x.size(1)
    if x.dim() != 4 or cos.shape not in ((seq, 1, 1, size), (seq, batch, 1, size)) or sin.shape != cos.shape:
        raise ValueError(f"rotary: angles of {list(cos.shape)} and {list(sin.shape)} for heads of "
                         f"{list(x.shape)}")
    if size % 2 or size > x.size(-1) or cos.dtype != x.dtype or sin.dtype != x.dtype:
        raise ValueError(f"rotary: angles of {size} dimensions in {cos.dtype} for heads of {x.size(-1)} in "
                         f"{x.dtype}")
    form = form_of("rotary", x.device.type, FORMS, (plain, plain_interleaved))[interleaved]
    if size == x.size(-1):
        return form(x, cos, sin)
    return torch.cat([form(x[..., :size], cos, sin), x[..., size:]], dim=-1)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plain_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + swapped * sin


def cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result: Tensor = _Halves.apply(x, cos, sin)
    return result


class _Halves(torch.autograd.Function):
    """Compute both halves directly in the result: fewer passes over memory. The gradient is rotated back;
    angles have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    halves = [x.chunk(2, dim=-1), cos.chunk(2, dim=-1), sin.chunk(2, dim=-1), result.chunk(2, dim=-1)]
    (first, second), (cos_first, cos_second), (sin_first, sin_second), (to_first, to_second) = halves
    if sign > 0:
        torch.mul(first, cos_first, out=to_first).addcmul_(second, sin_first, value=-1)
        torch.mul(second, cos_second, out=to_second).addcmul_(first, sin_second)
    else:
        torch.mul(first, cos_first, out=to_first).addcmul_(second, sin_second)
        torch.mul(second, cos_second, out=to_second).addcmul_(first, sin_first, value=-1)
    return result


def npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_rotary_mul(x, cos, sin)
    return result


def npu_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """For adjacent pairs the fused op needs angles that all rows of a batch share, and fewer than 1000 heads
    in the batch (torch_npu's documentation of npu_rotary_mul)."""
    if cos.size(1) > 1 or x.size(1) * x.size(2) >= 1000:
        return plain_interleaved(x, cos, sin)
    result: Tensor = torch.ops.npu.npu_rotary_mul(x, cos, sin, "interleave")
    return result


Form = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Form, Form]] = {"cpu": (cpu, plain_interleaved), "npu": (npu, npu_interleaved)}
"""(pairs half a head apart, adjacent pairs) by device type."""


@dataclass(frozen=True)
class Scaling:
    """How frequencies are scaled beyond the original length (in tokens); fields are named as in Hugging Face
    configs.

    - `linear`: all are divided by `factor` (Chen et al. 2023).
    - `dynamic`: a larger base once a sequence is longer than the original length (NTK-aware, as in
      transformers).
    - `llama3`: wavelengths longer than original length / `low_freq_factor` are scaled by `factor`, those
      shorter than original length / `high_freq_factor` are kept, those in between are interpolated (Llama
      3.1).
    - `yarn`: pairs with more than `beta_fast` rotations in the original length are kept, those with fewer
      than `beta_slow` are scaled by `factor`, those in between are interpolated linearly (Peng et al. 2023).
    """

    kind: str
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def inverse_frequencies(dim: int, base: float, scaling: Scaling | None = None, *, length: int = 0) -> Tensor:
    """Return the angles per position [dim / 2] in fp32: pair i rotates by base^(-2i / dim), scaled by
    `scaling`.

    Args:
        length: of the sequence, in tokens; only `dynamic` uses it.
    """
    if scaling is not None and scaling.kind == "dynamic" and length > scaling.original_length:
        stretched = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        base = base * stretched ** (dim / (dim - 2))
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    keep = _kept_llama3(frequencies, scaling) if scaling.kind == "llama3" else _kept_yarn(dim, base, scaling)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _kept_llama3(frequencies: Tensor, scaling: Scaling) -> Tensor:
    turns = scaling.original_length * frequencies / (2 * math.pi)  # rotations in the original length
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0,
                                                                                                            1)


def _kept_yarn(dim: int, base: float, scaling: Scaling) -> Tensor:
    def pair(turns: float) -> float:
        """Return the (fractional) pair with this number of rotations in the original length."""
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def yarn_scale(factor: float, mscale: float) -> float:
    """Return yarn's scale of rotated dimensions: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
