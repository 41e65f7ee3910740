# SPDX-License-Identifier: Apache-2.0
"""The few formulas the references share, in plain PyTorch and fp32.

Covers the root mean square norm, rotary embedding in its two layouts, causal attention with grouped keys, and the two gated
feed-forward forms. Not covered: dropout, caches, padding, half precision. Nothing here comes from the packages under test.
A reference reads this file by path, as the tests read the reference, because tests are no importable package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def angles(length: int, size: int, base: float) -> Tensor:
    """[length, size / 2]: position * base^(-2i / size), the rotation of channel pair i."""
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return torch.outer(torch.arange(length, dtype=torch.float32), frequencies)


def dynamic_base(base: float, size: int, length: int, trained: int, factor: float) -> float:
    """Dynamic NTK scaling: beyond the trained length the base grows with the length of the whole sequence."""
    if length <= trained:
        return base
    return base * (factor * length / trained - (factor - 1)) ** (size / (size - 2))


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate [batch, seq, heads, size]: channel i pairs with channel i + size / 2."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate [batch, seq, heads, size]: channel 2i pairs with channel 2i + 1."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, seq, heads * size] -> [batch, seq, heads, size]."""
    return x.unflatten(-1, (heads, x.size(-1) // heads))


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, change: Callable[[Tensor, int], Tensor] | None = None
) -> Tensor:
    """Causal attention over [batch, seq, heads, size]; head h reads key group h // (heads / groups).

    `change(scores, head)` alters the scaled scores [batch, query, key] before the future is masked.
    """
    length, heads = query.shape[1:3]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        group = head // (heads // key.size(2))
        scores = query[:, :, head] @ key[:, :, group].transpose(1, 2) * scale
        if change is not None:
            scores = change(scores, head)
        outputs.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ value[:, :, group])
    return torch.cat(outputs, dim=-1)


def silu_gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x), each a weight [out, in]."""
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def gelu_gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(gelu(gate x) * up x) with the exact (erf) GELU, each a weight [out, in]."""
    return (torch.nn.functional.gelu(x @ gate.T) * (x @ up.T)) @ down.T


def mixture(x: Tensor, weights: Tensor, chosen: Tensor, expert: Callable[[int, Tensor], Tensor], experts: int) -> Tensor:
    """Sum over the chosen experts of weight * expert(e, x); `weights` and `chosen` are [batch, seq, k].

    Every expert sees every token, so that no token is dropped and nothing is moved.
    """
    output = torch.zeros_like(x)
    for e in range(experts):
        share = (weights * (chosen == e)).sum(-1, keepdim=True)
        output = output + share * expert(e, x)
    return output
