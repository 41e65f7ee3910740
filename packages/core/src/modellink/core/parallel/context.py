# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: which tokens of a sequence this rank holds.

A sequence is split into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r, which balances causal attention.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor


def local_positions(length: int, device: torch.device) -> Tensor:
    """Positions [length] of the `length` tokens of this rank."""
    cp, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    chunk = torch.arange(length // 2, device=device)
    return torch.cat([chunk + rank * (length // 2), chunk + (2 * cp - 1 - rank) * (length // 2)])


def local_part(x: Tensor) -> Tensor:
    """The part of x [batch, seq] that belongs to this rank's tokens."""
    cp = parallel_state.get_context_parallel_world_size()
    return x if cp == 1 else x[:, local_positions(x.size(1) // cp, x.device)]


def natural_order(chunks: list[int]) -> list[int]:
    """Indices that sort a list of chunk numbers."""
    return sorted(range(len(chunks)), key=chunks.__getitem__)


def held_chunks(ranks: list[int], cp: int) -> list[int]:
    """Chunk numbers that these context-parallel ranks hold, in the order of their tokens."""
    return [chunk for rank in ranks for chunk in (rank, 2 * cp - 1 - rank)]
