"""The keys and values of the tokens a model has seen, in pages of memory that is taken once.

A pass is one line of tokens: single new tokens of some rows, then pieces of the prompts of others. Single tokens of rows of about
one length are attended together, over keys gathered from their pages; a piece attends alone, and where it starts a row needs
nothing but itself. Latent attention keeps its compressed form: one key for all heads, whose first part is the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.state import SequenceState
from modellink.infer.pages import GONE, SIZE, Pool, Row, Tables
from modellink.kernels import ops
from modellink.kernels.ops.attention import Variant

WASTED = 512  # keys gathered for nothing that may cost less than another attention; a guess, not tuned


@dataclass(frozen=True)
class Piece:
    """`count` tokens of a row from `start`, that a pass computes."""

    row: Row
    start: int
    count: int


@dataclass(frozen=True)
class Part:
    """Tokens of a pass that attend together: queries [rows x count] to gathered keys [keys, rows]."""

    tokens: slice
    rows: int
    slots: Tensor | slice | None  # None: causal over the tokens themselves
    positions: Tensor | None  # [rows, count], counted from the first key


@dataclass(frozen=True)
class Plan:
    """A pass, for the layers of one pool."""

    slots: Tensor  # [tokens] where the new keys go
    parts: list[Part]

    def copy(self, device: torch.device) -> Plan:
        """The same with tensors of its own; of a pass of single tokens."""
        (part,) = self.parts
        assert isinstance(part.slots, Tensor) and part.positions is not None
        slots, positions = part.slots.to(device, copy=True), part.positions.to(device, copy=True)
        return Plan(self.slots.to(device, copy=True), [Part(part.tokens, part.rows, slots, positions)])

    def take(self, other: Plan) -> None:
        """Write the numbers of another plan of this size over one's own."""
        (part,), (new,) = self.parts, other.parts
        for held, value in ((self.slots, other.slots), (part.slots, new.slots), (part.positions, new.positions)):
            assert isinstance(held, Tensor) and isinstance(value, Tensor)
            held.copy_(value)


@dataclass(frozen=True)
class Flat:
    """A pass token by token: token n stores in slot[n] and sees slots[begin[n] : begin[n] + count[n]]."""

    slot: Tensor
    slots: Tensor
    begin: Tensor
    count: Tensor


def moves(spec: ModelSpec, length: int) -> bool:
    """Whether in a sequence of so many tokens every further one changes the angles of all (dynamic rotary scaling beyond the
    length it begins at): what was computed before then serves neither the next pass nor another row."""
    return spec.rope_scaling_type == "dynamic" and length > (spec.original_max_position_embeddings or 0)


def bytes_per_token(spec: ModelSpec, layers: int, tp: int, dtype: torch.dtype) -> int:
    return layers * dtype.itemsize * sum(groups * dim for groups, dim in _shapes(spec, tp) if dim)


def bytes_of(spec: ModelSpec, layers: range, *, tokens: int, rows: int, piece: int, tp: int, dtype: torch.dtype) -> int:
    """Memory that a cache takes; see `PagedCache` for the arguments."""
    pages = sum(_pages(spec.window(layer), tokens, rows, piece) for layer in layers)
    return pages * SIZE * bytes_per_token(spec, 1, tp, dtype)


def _pages(window: int | None, tokens: int, rows: int, piece: int) -> int:
    """Of a pool."""
    pages = -(-tokens // SIZE)
    return pages if window is None else min(pages, rows * _most_pages(window, piece))


def _most_pages(window: int, piece: int) -> int:
    """Pages that a row of any length has at a time where layers have a window: what it sees, and a piece more."""
    return -(-(window + piece + 2 * SIZE) // SIZE)


def _shapes(spec: ModelSpec, tp: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(groups, size) of a key and of a value as they are kept on a rank."""
    if spec.multi_head_latent_attention:
        return (1, (spec.kv_lora_rank or 0) + spec.rotary_dim), (1, 0)
    return (spec.groups // tp, spec.head_dim), (spec.groups // tp, spec.value_dim)


class PagedCache:
    """core's `Cache` for the layers of this rank.

    Args:
        layers: global numbers (from 0) of the layers this rank holds.
        tokens: room for so many, over all rows.
        rows: how many rows there may be at once, each of which gets at most `piece` tokens in a pass; this bounds what
            layers with a window need.
    """

    def __init__(self, spec: ModelSpec, layers: range, *, tokens: int, rows: int, piece: int, tp: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.spec, self.device, self.piece = spec, device, piece
        windows = sorted({spec.window(layer) for layer in range(spec.num_layers)}, key=lambda window: window or 0)
        self.pools = [Pool(_pages(window, tokens, rows, piece), window) for window in windows]
        self.tables = Tables(self.pools)
        self._pool_of = {layer + 1: windows.index(spec.window(layer)) for layer in layers}
        self._latent = spec.kv_lora_rank if spec.multi_head_latent_attention else None
        key, value = _shapes(spec, tp)
        self._keys, self._values = ({
            layer: torch.empty(self.pools[pool].pages * SIZE + 1, *shape, dtype=dtype, device=device)  # the last is nobody's
            for layer, pool in self._pool_of.items()} for shape in (key, value))
        self._pieces: Sequence[Piece] = ()
        self._positions = torch.empty(0)
        self._plans: list[Plan] = []  # of the pass under way, for each pool

    def pages_of(self, pool: Pool, length: int) -> int:
        """Pages of a pool that a row of so many tokens has at most at a time."""
        pages = -(-length // SIZE)
        return pages if pool.window is None else min(pages, _most_pages(pool.window, self.piece))

    @property
    def tokens(self) -> int:
        """How many tokens a single row may have."""
        return min((pool.pages * SIZE for pool in self.pools
                    if pool.window is None or pool.pages < _most_pages(pool.window, self.piece)), default=1 << 62)

    @property
    def bytes(self) -> int:
        return sum(held.nbytes for side in (self._keys, self._values) for held in side.values())

    def state(self, pieces: Sequence[Piece], wanted: Sequence[int] | None = None) -> SequenceState:
        """What the model is told for a pass over these pieces; their pages are there (`tables.grow`).

        Args:
            pieces: those of one token first, best the longest rows first.
            wanted: which tokens of the pass logits are computed for; None: the last of each piece.
        """
        positions = torch.cat([torch.arange(piece.start, piece.start + piece.count) for piece in pieces])
        if wanted is None:
            wanted = torch.tensor([piece.count for piece in pieces]).cumsum(0).sub(1).tolist()
        self._pieces, self._positions, self._plans = pieces, positions, []
        lengths = None
        if self.spec.rope_scaling_type == "dynamic":
            lengths = torch.cat([torch.full((piece.count,), len(piece.row.tokens)) for piece in pieces])[None].to(self.device)
        return SequenceState(positions=positions[None].to(self.device), length=int(positions.max()) + 1, lengths=lengths,
                             cache=self, wanted=torch.tensor([wanted], dtype=torch.long, device=self.device))

    def _plan(self, number: int, pieces: Sequence[Piece], positions: Tensor) -> Plan:
        pool = self.pools[number]
        tables = [torch.tensor(piece.row.tables[number]) for piece in pieces]
        pages = torch.cat([table[torch.arange(piece.start, piece.start + piece.count) // SIZE]
                           for piece, table in zip(pieces, tables, strict=True)])
        slots = pages * SIZE + positions % SIZE
        parts = [self._part(pool, run, pieces[run], tables[run]) for run in _runs(pool, pieces)]
        place = single = sum(piece.count == 1 for piece in pieces)
        for piece, table in zip(pieces[single:], tables[single:], strict=True):
            tokens = slice(place, place := place + piece.count)
            parts.append(Part(tokens, 1, None, None) if piece.start == 0 else self._part(pool, tokens, [piece], [table]))
        return Plan(slots.to(self.device), parts)

    def _part(self, pool: Pool, tokens: slice, pieces: Sequence[Piece], tables: Sequence[Tensor]) -> Part:
        """The keys that the tokens of rows see, each row's from the page of its first one."""
        columns, positions = self._columns(pool, pieces, tables)
        slots, positions = columns.flatten(), positions.to(self.device)
        first, last = int(slots[0]), int(slots[-1])
        if len(pieces) == 1 and last - first == len(slots) - 1 and bool((slots.diff() == 1).all()):
            return Part(tokens, 1, slice(first, last + 1), positions)
        return Part(tokens, len(pieces), slots.to(self.device), positions)

    def _columns(self, pool: Pool, pieces: Sequence[Piece], tables: Sequence[Tensor], length: int | None = None,
                 ) -> tuple[Tensor, Tensor]:
        """Slots [keys, rows] of what pieces see, and their positions [rows, count] among them; `length`: of so many keys."""
        firsts = torch.tensor([pool.first_seen(piece.start) // SIZE * SIZE for piece in pieces])
        starts = torch.tensor([piece.start for piece in pieces])
        ends = starts + pieces[0].count
        keys = torch.arange(length or int((ends - firsts).max()))[:, None] + firsts
        keys = keys.minimum(ends - 1)  # behind a row's end its last key stands in, which nothing sees: no stale memory is read
        slots = torch.stack([table[column // SIZE] * SIZE + column % SIZE
                             for table, column in zip(tables, keys.t(), strict=True)], dim=1)
        return slots, (starts - firsts)[:, None] + torch.arange(pieces[0].count)

    def padded(self, rows: int, keys: int) -> list[Plan]:
        """The pass of single tokens that `state` was told about, for the layers of each pool, on the CPU: with `rows` rows that
        see `keys` keys. Rows beyond those there are have the slot that is nobody's."""
        plans = []
        for number, pool in enumerate(self.pools):
            tables = [torch.tensor(piece.row.tables[number]) for piece in self._pieces]
            seen = keys if pool.window is None else min(keys, (pool.window + 2 * SIZE - 2) // SIZE * SIZE)
            columns, places = self._columns(pool, self._pieces, tables, seen)
            slots = torch.full((seen, rows), pool.pages * SIZE)
            slots[:, :len(tables)] = columns
            positions = torch.zeros(rows, 1, dtype=torch.long)
            positions[:len(tables)] = places
            new = slots[positions[:, 0], torch.arange(rows)]
            plans.append(Plan(new, [Part(slice(0, rows), rows, slots.flatten(), positions)]))
        return plans

    def plan(self, plans: list[Plan]) -> None:
        """Let the layers of the next pass go by these."""
        self._plans = plans

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor | None, variant: Variant) -> Tensor:
        if not self._plans:  # the first layer of a pass
            self._plans = [self._plan(number, self._pieces, self._positions) for number in range(len(self.pools))]
        plan = self._plans[self._pool_of[layer_number]]
        keys, values = self._keys[layer_number], self._values[layer_number]
        keys.index_copy_(0, plan.slots, key.squeeze(1))
        if value is None:
            value, values = key[..., :self._latent], keys[..., :self._latent]
        else:
            values.index_copy_(0, plan.slots, value.squeeze(1))
        found = []
        for part in plan.parts:
            q = query[part.tokens]
            if part.slots is None:
                found.append(ops.attention(q, key[part.tokens], value[part.tokens], variant))
                continue
            q = q.view(part.rows, -1, *q.shape[2:]).transpose(0, 1)
            k, v = (_taken(held, part.slots).unflatten(0, (-1, part.rows)) for held in (keys, values))
            out = ops.attention(q, k, v, variant, part.positions)
            found.append(out.transpose(0, 1).flatten(0, 1).unsqueeze(1))
        return found[0] if len(found) == 1 else torch.cat(found)

    @property
    def longest(self) -> int:
        """One more than the largest position of the pass under way."""
        return max(piece.start + piece.count for piece in self._pieces)

    @property
    def singles(self) -> bool:
        """Whether the pass under way has one token of each row."""
        return all(piece.count == 1 for piece in self._pieces)

    def flat(self) -> Flat:
        """The pass over the pages of the only pool, token by token."""
        (pool,) = self.pools
        slots, begin, count, at = [], [], [], 0
        for piece in self._pieces:
            first = pool.first_seen(piece.start)
            column = torch.arange(first, piece.start + piece.count)
            slots.append(torch.tensor(piece.row.tables[0])[column // SIZE] * SIZE + column % SIZE)
            for position in range(piece.start, piece.start + piece.count):
                low = pool.first_seen(position)
                begin.append(at + low - first)
                count.append(position + 1 - low)
            at += len(column)
        every = torch.cat(slots)
        ends = [start + seen - 1 for start, seen in zip(begin, count, strict=True)]
        return Flat(every[ends], every, torch.tensor(begin), torch.tensor(count))

    def memory(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [slots, groups, dim] of each layer."""
        return list(zip(self._keys.values(), self._values.values(), strict=True))

    def fork(self, row: Row, tokens: list[int]) -> Row:
        """Another row with what `row` has, that goes on with `tokens`: full pages are shared, the page in work is copied.

        There must be a page free in every pool.
        """
        tables = []
        for pool, table in zip(self.pools, row.tables, strict=True):
            whole = row.computed // SIZE
            copy = [pool.share(page) for page in table[:whole]]
            for page in table[whole:]:
                copy.append(pool.take())
                self._copy(pool, page, copy[-1])
            tables.append(copy)
        return Row(tokens, row.computed, tables, list(row.digests[:row.computed // SIZE]))

    def _copy(self, pool: Pool, source: int, target: int) -> None:
        old, new = (slice(page * SIZE, (page + 1) * SIZE) for page in (source, target))
        for layer, number in self._pool_of.items():
            if self.pools[number] is pool:
                for side in (self._keys, self._values):
                    side[layer][new] = side[layer][old]


def _runs(pool: Pool, pieces: Sequence[Piece]) -> Iterator[slice]:
    """Pieces of one token that attend together: every row of a run is gathered as if it had the length of the longest of them."""
    begin, longest = 0, 0
    for place, piece in enumerate(pieces):
        if piece.count > 1:
            break
        length = piece.start + 1 - pool.first_seen(piece.start)
        if place > begin and 2 * length + WASTED < longest:
            yield slice(begin, place)
            begin, longest = place, 0
        longest = max(longest, length)
    else:
        place = len(pieces)
    if begin < place:
        yield slice(begin, place)


def _taken(held: Tensor, slots: Tensor | slice) -> Tensor:
    # index_select copies whole keys, where indexing looks up each number: a third of the time on one thread, less on several
    return held[slots] if isinstance(slots, slice) else held.index_select(0, slots)


__all__ = ["GONE", "SIZE", "Flat", "PagedCache", "Piece", "Row", "bytes_per_token", "moves"]
