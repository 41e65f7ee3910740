# SPDX-License-Identifier: Apache-2.0
"""What attention needs to know about a batch in addition to its hidden states: positions, documents and a cache.

It travels through megatron-core as `packed_seq_params`, which the transformer block hands to every attention layer unread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from modellink.ckpt_convert.layer import RopeSpec
from modellink.kernels.ops.attention import Documents, Variant


class Cache(Protocol):
    """Keys and values of earlier tokens; modellink.infer provides it."""

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor | None, variant: Variant) -> Tensor:
        """Store keys and values of the tokens of this pass, and let the queries attend to these and all earlier ones.

        Args:
            layer_number: from 1, over all pipeline stages.
            query: [seq, batch, heads, dim] of this rank.
            key: [seq, batch, groups, dim].
            value: [seq, batch, groups, value dim]. None: it is the first part of the key (latent attention).
            variant: the attention of this layer.

        Returns:
            [seq, batch, heads, value dim]
        """
        ...


@dataclass
class SequenceState(PackedSeqParams):
    """Describes one forward pass; every pass has a new one. Without one, a batch is full sequences from position 0.

    Attributes:
        positions: [batch, seq]. Default: 0 .. seq - 1.
        length: one more than the largest position, if known without asking the device.
        lengths: [batch, seq], the length of the sequence of each token, if the batch mixes sequences.
        documents: boundaries of packed documents within full sequences, also if a rank holds only a part of them.
        cache: keys and values of earlier passes.
        wanted: [batch, n], the tokens to compute logits for. Default: all.
        angles: cos and sin of the positions by kind of rotary embedding; the first layer of a kind fills them in.
    """

    positions: Tensor | None = None
    length: int | None = None
    lengths: Tensor | None = None
    documents: Documents | None = None
    cache: Cache | None = None
    wanted: Tensor | None = None
    angles: dict[RopeSpec, tuple[Tensor, Tensor]] = field(default_factory=dict)
