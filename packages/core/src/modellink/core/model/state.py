"""What attention must know about a batch beside its hidden states: where its tokens stand, and a cache.

It travels through megatron-core in the place of `packed_seq_params`, which GPTModel hands to every attention layer unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from modellink.kernels.ops.attention import Documents, Variant


class Cache(Protocol):
    """Keys and values of earlier tokens; infer owns the one in use."""

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor | None, variant: Variant) -> Tensor:
        """Store the keys and values of the tokens of a pass and let the queries attend to them and to those before.

        Args:
            layer_number: from 1, over all stages.
            query: [seq, batch, heads, dim] of this rank.
            key: [seq, batch, groups, dim].
            value: [seq, batch, groups, value dim]; None where it is the first part of the key (latent attention).
            variant: what this layer's attention is.

        Returns:
            [seq, batch, heads, value dim]."""
        ...


@dataclass
class SequenceState(PackedSeqParams):
    """What one pass is about; a new one is made for every pass. Absent (None), a batch is whole sequences from position 0."""

    positions: Tensor | None = None  # [batch, seq]; None: 0 .. seq - 1
    length: int | None = None  # one more than the largest position, where it is known without asking the device
    lengths: Tensor | None = None  # [batch, seq] of the sequence a token belongs to, where the batch mixes several
    documents: Documents | None = None  # packed into the batch; of whole sequences, also where a rank holds a part of them
    cache: Cache | None = None
    wanted: Tensor | None = None  # [batch, n] which tokens of the pass logits are computed for; None: all
    angles: tuple[Tensor, Tensor] | None = None  # cos and sin of the positions, kept by the first layer for the others
