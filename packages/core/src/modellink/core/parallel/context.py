"""Context parallelism: which tokens of a sequence this rank holds.

A sequence is cut into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r, so that causal attention is as much work on each.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor


def local_positions(length: int, device: torch.device) -> Tensor:
    """[length] positions of this rank's tokens, of which there are `length`."""
    cp, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    chunk = torch.arange(length // 2, device=device)
    return torch.cat([chunk + rank * (length // 2), chunk + (2 * cp - 1 - rank) * (length // 2)])


def local_part(x: Tensor) -> Tensor:
    """This rank's tokens of x [batch, seq]."""
    cp = parallel_state.get_context_parallel_world_size()
    return x if cp == 1 else x[:, local_positions(x.size(1) // cp, x.device)]


def natural_order(chunks: list[int]) -> list[int]:
    """Where each chunk stands in a list of chunk numbers, in the order of the numbers."""
    return sorted(range(len(chunks)), key=chunks.__getitem__)


def held_chunks(ranks: list[int], cp: int) -> list[int]:
    """The chunks that these context-parallel ranks hold, in the order of their tokens."""
    return [chunk for rank in ranks for chunk in (rank, 2 * cp - 1 - rank)]
