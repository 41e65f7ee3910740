"""What attention must know about a batch beside its hidden states: where its tokens stand, and a cache.

It travels through megatron-core in the place of `packed_seq_params`, which GPTModel hands to every attention layer unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Cache(Protocol):
    """Keys and values of earlier tokens; infer owns the one in use."""

    def update(self, layer_number: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [seq, batch, groups, dim] of a layer (from 1) at `positions` [batch, seq]; return
        all of its keys and values [key seq, batch, groups, dim], where slot j holds position j."""
        ...


@dataclass
class SequenceState(PackedSeqParams):
    """Absent (None), a batch is whole sequences from position 0."""

    positions: Tensor | None = None  # [batch, seq]
    cache: Cache | None = None
