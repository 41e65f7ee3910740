# SPDX-License-Identifier: Apache-2.0
"""All-to-all between heads and tokens (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509)."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """All-to-all of [n, ...]: entry i goes to rank i, entry i of the result came from rank i. It is its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x := x.contiguous())
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(x := gradients[0].contiguous())
        dist.all_to_all_single(out, x, group=ctx.group)
        return out, None


def heads_for_tokens(x: Tensor, group: Any) -> Tensor:
    """[seq, batch, heads, dim] of this rank's tokens -> [n x seq, batch, heads / n, dim] of this rank's heads.

    The tokens are in the order of the ranks.
    """
    pieces: Tensor = _Exchange.apply(torch.stack(x.chunk(group.size(), dim=2)), group)
    return pieces.flatten(0, 1)


def tokens_for_heads(x: Tensor, group: Any) -> Tensor:
    """The inverse of `heads_for_tokens`."""
    pieces: Tensor = _Exchange.apply(torch.stack(x.chunk(group.size())), group)
    return torch.cat(pieces.unbind(), dim=2)


def repeated(x: Tensor, ranks: int, heads: int, *, in_full: bool) -> Tensor:
    """Keys or values [seq, batch, groups, dim] with groups repeated until `ranks` divides them.

    Args:
        in_full: repeat to the number of query `heads`, as the original does.
    """
    times = heads // x.size(2) if in_full else ranks // gcd(ranks, x.size(2))
    return x if times == 1 else x.repeat_interleave(times, dim=2)
