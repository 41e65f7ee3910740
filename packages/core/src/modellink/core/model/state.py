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

    def update(self, layer_number: int, key: Tensor, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [seq, batch, groups, dim] of a layer (from 1) at `positions` [batch, seq]; return
        all of its keys and values [key seq, batch, groups, dim], where slot j holds position j.

        Without positions the new tokens are the first ones: they are stored at 0 .. seq - 1 and are all there is."""
        ...


@dataclass
class SequenceState(PackedSeqParams):
    """What one pass is about; a new one is made for every pass. Absent (None), a batch is whole sequences from position 0."""

    positions: Tensor | None = None  # [batch, seq]; None: 0 .. seq - 1
    length: int | None = None  # one more than the largest position, where it is known without asking the device
    cache: Cache | None = None
    wanted: Tensor | None = None  # [batch, n] which tokens of the pass logits are computed for; None: all
    angles: tuple[Tensor, Tensor] | None = None  # cos and sin of the positions, kept by the first layer for the others
