# SPDX-License-Identifier: Apache-2.0
"""How a pass over a paged cache attends: which slots it writes, and which tokens attend together to which
slots.

A pass is one line of tokens: the decode steps of some sequences, then prefill chunks of others. Decode steps
of sequences of similar length attend together, over keys gathered from their pages. A prefill chunk attends
separately; one that starts its sequence needs no keys but its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.infer.cache import PagedCache
from modellink.infer.pages import PAGE_SIZE, Chunk, PagePool
from modellink.kernels import ops
from modellink.kernels.ops.attention import Variant

PADDING_KEYS = 512  # keys gathered as padding that may cost less than one more attention call; untuned


@dataclass(frozen=True)
class AttentionGroup:
    """Tokens of a pass that attend together: queries [sequences x count] to gathered keys [keys, sequences].

    Attributes:
        tokens: positions of the queries in the pass.
        sequences: number of sequences.
        slots: where the keys are, [keys x sequences]; None: the tokens attend causally to each other.
        positions: of the queries, [sequences, count], counted from the first key; None if `slots` is None.
    """

    tokens: slice
    sequences: int
    slots: Tensor | slice | None
    positions: Tensor | None


@dataclass(frozen=True)
class PassPlan:
    """What a pass writes and reads in the layers of one pool.

    Attributes:
        slots: where the new keys and values go, [tokens].
        groups: in the order of the tokens.
    """

    slots: Tensor
    groups: list[AttentionGroup]

    def copy(self, device: torch.device) -> PassPlan:
        """Return a copy of the plan of a decode pass with tensors of its own on `device`."""
        (group,) = self.groups
        assert isinstance(group.slots, Tensor) and group.positions is not None
        slots, positions = group.slots.to(device, copy=True), group.positions.to(device, copy=True)
        return PassPlan(self.slots.to(device, copy=True),
                        [AttentionGroup(group.tokens, group.sequences, slots, positions)])

    def overwrite(self, other: PassPlan) -> None:
        """Copy the numbers of another decode plan of the same size into the tensors of this one."""
        (group,), (new,) = self.groups, other.groups
        for target, value in ((self.slots, other.slots), (group.slots, new.slots),
                              (group.positions, new.positions)):
            assert isinstance(target, Tensor) and isinstance(value, Tensor)
            target.copy_(value)


@dataclass(frozen=True)
class PlannedAttention:
    """core's `Cache` for one pass: attention over `cache` by one plan per pool."""

    cache: PagedCache
    plans: Sequence[PassPlan]

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor | None,
               variant: Variant) -> Tensor:
        cache, plan = self.cache, self.plans[self.cache.pool_of_layer[layer_number]]
        keys, values = cache.keys[layer_number], cache.values[layer_number]
        keys.index_copy_(0, plan.slots, key.squeeze(1))
        if value is None:
            value, values = key[..., :cache.latent], keys[..., :cache.latent]
        else:
            values.index_copy_(0, plan.slots, value.squeeze(1))
        found = []
        for group in plan.groups:
            q = query[group.tokens]
            if group.slots is None:
                found.append(ops.attention(q, key[group.tokens], value[group.tokens], variant))
                continue
            q = q.view(group.sequences, -1, *q.shape[2:]).transpose(0, 1)
            k, v = (_gather(memory, group.slots).unflatten(0, (-1, group.sequences))
                    for memory in (keys, values))
            out = ops.attention(q, k, v, variant, group.positions)
            found.append(out.transpose(0, 1).flatten(0, 1).unsqueeze(1))
        return found[0] if len(found) == 1 else torch.cat(found)


def plan_pass(cache: PagedCache, chunks: Sequence[Chunk], positions: Tensor) -> list[PassPlan]:
    """Return the plan of a pass for each pool of a cache.

    Args:
        chunks: decode steps first.
        positions: of all tokens of the pass, on the CPU.
    """
    return [_plan(cache, number, chunks, positions) for number in range(len(cache.pools))]


def padded_plans(cache: PagedCache, chunks: Sequence[Chunk], sequences: int, keys: int) -> list[PassPlan]:
    """Return plans of a fixed size for a decode pass, one per pool, on the CPU.

    Args:
        chunks: decode steps, at most `sequences`. The missing ones write to the slot that belongs to no page.
        keys: number of keys that each sequence attends to.
    """
    plans = []
    for number, pool in enumerate(cache.pools):
        tables = [torch.tensor(chunk.sequence.tables[number]) for chunk in chunks]
        visible = keys
        if pool.window is not None:
            visible = min(keys, (pool.window + 2 * PAGE_SIZE - 2) // PAGE_SIZE * PAGE_SIZE)
        columns, offsets = _columns(pool, chunks, tables, visible)
        slots = torch.full((visible, sequences), pool.pages * PAGE_SIZE)
        slots[:, :len(tables)] = columns
        positions = torch.zeros(sequences, 1, dtype=torch.long)
        positions[:len(tables)] = offsets
        new = slots[positions[:, 0], torch.arange(sequences)]
        plans.append(PassPlan(new, [AttentionGroup(slice(0, sequences), sequences, slots.flatten(),
                                                   positions)]))
    return plans


def _plan(cache: PagedCache, number: int, chunks: Sequence[Chunk], positions: Tensor) -> PassPlan:
    pool = cache.pools[number]
    tables = [torch.tensor(chunk.sequence.tables[number]) for chunk in chunks]
    pages = torch.cat([table[torch.arange(chunk.start, chunk.end) // PAGE_SIZE]
                       for chunk, table in zip(chunks, tables, strict=True)])
    slots = pages * PAGE_SIZE + positions % PAGE_SIZE
    groups = [_group(cache, pool, run, chunks[run], tables[run]) for run in _decode_runs(pool, chunks)]
    decoding = sum(chunk.count == 1 for chunk in chunks)
    begin = decoding
    for chunk, table in zip(chunks[decoding:], tables[decoding:], strict=True):
        tokens = slice(begin, begin + chunk.count)
        begin += chunk.count
        if chunk.start == 0:
            groups.append(AttentionGroup(tokens, 1, None, None))
        else:
            groups.append(_group(cache, pool, tokens, [chunk], [table]))
    return PassPlan(slots.to(cache.device), groups)


def _group(cache: PagedCache, pool: PagePool, tokens: slice, chunks: Sequence[Chunk],
           tables: Sequence[Tensor],
           ) -> AttentionGroup:
    """Return the group of chunks of equal size, with each sequence's keys from the page of the first visible
    one."""
    columns, positions = _columns(pool, chunks, tables)
    slots, positions = columns.flatten(), positions.to(cache.device)
    first, last = int(slots[0]), int(slots[-1])
    if len(chunks) == 1 and last - first == len(slots) - 1 and bool((slots.diff() == 1).all()):
        return AttentionGroup(tokens, 1, slice(first, last + 1), positions)
    return AttentionGroup(tokens, len(chunks), slots.to(cache.device), positions)


def _columns(pool: PagePool, chunks: Sequence[Chunk], tables: Sequence[Tensor], length: int | None = None,
             ) -> tuple[Tensor, Tensor]:
    """Return the slots [keys, sequences] that chunks of equal size attend to, and their positions [sequences,
    count] in them.

    Args:
        length: number of keys. Default: what the longest sequence needs.
    """
    firsts = torch.tensor([pool.first_visible(chunk.start) // PAGE_SIZE * PAGE_SIZE for chunk in chunks])
    starts = torch.tensor([chunk.start for chunk in chunks])
    ends = starts + chunks[0].count
    keys = torch.arange(length or int((ends - firsts).max()))[:, None] + firsts
    # pad with the last key, which is masked there: uninitialized memory could hold NaN
    keys = keys.minimum(ends - 1)
    slots = torch.stack([table[column // PAGE_SIZE] * PAGE_SIZE + column % PAGE_SIZE
                         for table, column in zip(tables, keys.t(), strict=True)], dim=1)
    return slots, (starts - firsts)[:, None] + torch.arange(chunks[0].count)


def _decode_runs(pool: PagePool, chunks: Sequence[Chunk]) -> Iterator[slice]:
    """Yield runs of decode steps that attend together; each sequence is padded to the longest of its run."""
    begin, longest, end = 0, 0, sum(chunk.count == 1 for chunk in chunks)
    for index, chunk in enumerate(chunks[:end]):
        length = chunk.end - pool.first_visible(chunk.start)
        if index > begin and 2 * length + PADDING_KEYS < longest:
            yield slice(begin, index)
            begin, longest = index, 0
        longest = max(longest, length)
    if begin < end:
        yield slice(begin, end)


def _gather(memory: Tensor, slots: Tensor | slice) -> Tensor:
    # index_select copies whole keys, indexing looks up each number: a third of the time on one thread, less
    # on several
    return memory[slots] if isinstance(slots, slice) else memory.index_select(0, slots)
