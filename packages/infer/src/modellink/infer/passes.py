# SPDX-License-Identifier: Apache-2.0
"""A pass: the tokens that the model computes at once, as a value.

It holds chunks of sequences in a paged cache and says after which tokens the logits are wanted. core's model
runs it through `state`; the compiled step and captured graphs have their own views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modellink.core.model.state import SequenceState
from modellink.infer.attention import PassPlan, PlannedAttention, padded_plans, plan_pass
from modellink.infer.cache import PagedCache
from modellink.infer.pages import PAGE_SIZE, Chunk


@dataclass(frozen=True)
class FlatPass:
    """A pass token by token: token n writes slot[n] and attends to slots[begin[n] : begin[n] + count[n]]."""

    slot: Tensor
    slots: Tensor
    begin: Tensor
    count: Tensor


@dataclass(frozen=True)
class Pass:
    """Chunks of sequences that are computed together. Their pages must be allocated (`PageTables.grow`).

    Args:
        chunks: decode steps first, ideally with the longest sequences first.
        wanted: indices of the tokens of the pass after which logits are computed.
    """

    cache: PagedCache
    chunks: Sequence[Chunk]
    wanted: Sequence[int]

    @classmethod
    def after_each(cls, cache: PagedCache, chunks: Sequence[Chunk]) -> Pass:
        """Return a pass with logits after the last token of each chunk."""
        return cls(cache, chunks, torch.tensor([chunk.count for chunk in chunks]).cumsum(0).sub(1).tolist())

    @cached_property
    def token_ids(self) -> Tensor:
        """[1, tokens], on the CPU."""
        return torch.tensor([[token for chunk in self.chunks for token in chunk.token_ids]])

    @cached_property
    def positions(self) -> Tensor:
        """[tokens], on the CPU."""
        return torch.cat([torch.arange(chunk.start, chunk.end) for chunk in self.chunks])

    @property
    def length(self) -> int:
        """One more than the largest position."""
        return max(chunk.end for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """Whether the pass has one token of each sequence."""
        return all(chunk.count == 1 for chunk in self.chunks)

    def state(self) -> SequenceState:
        """Return what core's model needs to run this pass."""
        device, lengths = self.cache.device, None
        if self.cache.spec.rope_scaling_type == "dynamic":
            lengths = torch.cat([torch.full((chunk.count,), len(chunk.sequence.tokens))
                                 for chunk in self.chunks])
            lengths = lengths[None].to(device)
        plans = plan_pass(self.cache, self.chunks, self.positions)
        wanted = torch.tensor([self.wanted], dtype=torch.long, device=device)
        return SequenceState(positions=self.positions[None].to(device), length=self.length, lengths=lengths,
                             cache=PlannedAttention(self.cache, plans), wanted=wanted)

    def padded_plans(self, sequences: int, keys: int) -> list[PassPlan]:
        """Return plans of a fixed size for this decode pass; see attention.py."""
        return padded_plans(self.cache, self.chunks, sequences, keys)

    def flat(self) -> FlatPass:
        """Return the slots of each token, in the cache's only pool."""
        (pool,) = self.cache.pools
        slots, begin, count, offset = [], [], [], 0
        for chunk in self.chunks:
            first = pool.first_visible(chunk.start)
            column = torch.arange(first, chunk.end)
            pages = torch.tensor(chunk.sequence.tables[0])[column // PAGE_SIZE]
            slots.append(pages * PAGE_SIZE + column % PAGE_SIZE)
            for position in range(chunk.start, chunk.end):
                low = pool.first_visible(position)
                begin.append(offset + low - first)
                count.append(position + 1 - low)
            offset += len(column)
        all_slots = torch.cat(slots)
        ends = [start + seen - 1 for start, seen in zip(begin, count, strict=True)]
        return FlatPass(all_slots[ends], all_slots, torch.tensor(begin), torch.tensor(count))
