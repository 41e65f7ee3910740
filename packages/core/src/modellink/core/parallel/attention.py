# SPDX-License-Identifier: Apache-2.0
"""Context-parallel attention: Ulysses, ring attention, or Ulysses within a ring.

Groups of `ulysses` ranks first exchange heads for tokens, so that each rank has all tokens of its group for some
heads. If a group does not hold the full sequence, keys and values then travel round a ring of groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from modellink.core import processes
from modellink.core.parallel.context import held_chunks, natural_order
from modellink.core.parallel.ring import Ring, ring_attention
from modellink.core.parallel.ulysses import heads_for_tokens, repeated, tokens_for_heads
from modellink.kernels import ops
from modellink.kernels.ops.attention import Variant


@dataclass(frozen=True)
class SequenceCut:
    """How a run shards sequences.

    Attributes:
        ulysses: size of the groups that exchange heads for tokens.
        overlap: overlap sending keys and values round the ring with computation, with separate groups for send and receive.
        repeat_in_full: repeat keys and values for every query head before the exchange, as the original does.
    """

    ulysses: int = 1
    overlap: bool = True
    repeat_in_full: bool = False


class ContextParallel:
    """Attention for the tokens of this rank; shapes as in `ops.attention`."""

    def __init__(self, how: SequenceCut) -> None:
        cp, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        self.how, inner, size = how, how.ulysses, cp // how.ulysses
        whole = parallel_state.get_context_parallel_group()
        groups = parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False) or [whole, whole]
        self.exchange = None if inner == 1 else whole if size == 1 else groups[0]
        sets = [list(range(start * inner, (start + 1) * inner)) for start in range(size)]
        self.order = natural_order(held_chunks(sets[rank // inner], cp))
        self.back = natural_order(self.order)
        held = [sorted(held_chunks(ranks, cp)) for ranks in sets]
        self.ring = None if size == 1 else Ring(whole if inner == 1 else groups[1], held,
                                                processes.second_ring() if how.overlap else None)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        if self.exchange is not None:
            ranks, heads = self.exchange.size(), query.size(2)
            key, value = (repeated(x, ranks, heads, in_full=self.how.repeat_in_full) for x in (key, value))
            query, key, value = (self._sorted(heads_for_tokens(x, self.exchange), self.order) for x in (query, key, value))
            if variant.slopes is not None:
                variant = replace(variant, slopes=variant.slopes.chunk(ranks)[self.exchange.rank()])
        else:
            query, key, value = (self._sorted(x, self.order) for x in (query, key, value))
        out = ops.attention(query, key, value, variant) if self.ring is None else ring_attention(
            query, key, value, variant, self.ring)
        out = self._sorted(out, self.back)
        return out if self.exchange is None else tokens_for_heads(out, self.exchange)

    @staticmethod
    def _sorted(x: Tensor, order: list[int]) -> Tensor:
        """x [seq, ...] with its chunks reordered."""
        if order == sorted(order):
            return x
        chunks = x.chunk(len(order))
        return torch.cat([chunks[place] for place in order])
