"""Tensors that stay on disk until some of their rows or columns are asked for.

All formats end in the same place: a tensor is a run of bytes in a file (`Stored`), and a canonical tensor is put together
from rectangles of such runs (`Assembled`). Reading is by plain reads into fresh memory, not by memory maps: what a
conversion holds is what was asked for, and a file that shrinks is an error, not a crash.

Not here: where the runs are (the format modules) and what they mean (rules.py, weights.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path

import torch

from modellink.kernels.errors import ModelLinkError

BLOCK = 1 << 20  # bytes read at once where only some columns are wanted; small, so that it stays in the cache
READ_LIMIT = 1 << 30  # bytes a single read asks for; Linux stops at 2 GiB


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


@dataclass(frozen=True)
class Stored:
    """A tensor [rows, columns] or [rows] whose first byte is at `offset` of the file `path`.

    It lies there row by row or, where it is `transposed`, column by column.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def flipped(self) -> Stored:
        """Its transpose; the same bytes."""
        return Stored(self.path, self.offset, self.dtype, self.shape[::-1], not self.transposed)

    def window(self, first: int, shape: tuple[int, ...]) -> Stored:
        """A tensor that lies inside the run of bytes of this one, from its element number `first`."""
        return Stored(self.path, self.offset + first * self.dtype.itemsize, self.dtype, shape)

    def read(self, rows: range, columns: range) -> torch.Tensor:
        """A rectangle of it, [rows, columns]; a vector has one column."""
        out = torch.empty(len(rows), len(columns), dtype=self.dtype)
        self.read_into(out, rows, columns)
        return out

    def read_into(self, out: torch.Tensor, rows: range, columns: range) -> None:
        """Read a rectangle into `out` [rows, columns], which may be a view into a larger tensor.

        Raises:
            ModelLinkError: the file ends too early.
        """
        if self.transposed:
            out.copy_(self.flipped.read(columns, rows).T)
            return
        row_bytes = self.columns * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            if len(columns) == self.columns and out.is_contiguous() and out.dtype == self.dtype:
                self._fill(file, out, self.offset + rows.start * row_bytes)
                return
            step = max(1, BLOCK // row_bytes)
            block = torch.empty(min(step, len(rows)), self.columns, dtype=self.dtype)
            for start in range(0, len(rows), step):
                block = block[:len(rows) - start]
                self._fill(file, block, self.offset + (rows.start + start) * row_bytes)
                out[start:start + len(block)] = block[:, columns.start:columns.stop]

    def _fill(self, file: io.FileIO, out: torch.Tensor, offset: int) -> None:
        view, done = as_bytes(out), 0
        file.seek(offset)
        while done < len(view):
            count = file.readinto(view[done:done + READ_LIMIT])
            if not count:
                raise ModelLinkError(f"the file ends at byte {offset + done}, in the middle of a tensor", where=self.path,
                                     fix="it was cut off or is being written; copy it again")
            done += count


@dataclass(frozen=True)
class Part:
    """A rectangle of a stored tensor, and where its first element lies in the whole: (row, column)."""

    stored: Stored
    rows: range
    columns: range
    at: tuple[int, int]


@dataclass(frozen=True)
class Assembled:
    """A tensor [rows, columns] or [rows] put together from parts that do not overlap; of a `sparse` one the rest is zero."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    sparse: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype; where the parts differ, the smallest one that holds them all exactly."""
        return reduce(torch.promote_types, (part.stored.dtype for part in self.parts))

    @property
    def transposed(self) -> bool:
        """Whether rows of it are columns of what is stored."""
        return any(part.stored.transposed for part in self.parts)

    def files(self) -> set[Path]:
        """The files it lies in."""
        return {part.stored.path for part in self.parts}

    def check(self) -> None:
        """Raise unless the parts cover the whole."""
        if self.sparse:
            return
        covered = sum(len(part.rows) * len(part.columns) for part in self.parts)
        if covered != prod(self.shape):
            raise ModelLinkError(f"{self.name} should have the shape {list(self.shape)}, that is {prod(self.shape):,} "
                                 f"numbers; {covered:,} were found",
                                 where=self.parts[0].stored.path if self.parts else None)

    def read(self, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        """The given ranges along `dim`, joined in order; of the other dimension `across`, or all of it."""
        size = [self.shape[0], prod(self.shape[1:])]
        across = range(size[1 - dim]) if across is None else across
        size[dim], size[1 - dim] = sum(map(len, pieces)), len(across)
        out = (torch.zeros if self.sparse else torch.empty)(size, dtype=self.dtype)
        for place, part, rows, columns in self._overlaps(pieces, dim, across):
            view = out[place[0]:place[0] + len(rows), place[1]:place[1] + len(columns)]
            part.stored.read_into(view, rows, columns)
        return out.view(-1) if len(self.shape) == 1 else out

    def _overlaps(self, pieces: Sequence[range], dim: int, across: range) -> Iterator[tuple[list[int], Part, range, range]]:
        """Where in the output; which part; its rows and columns: for every part that a piece touches."""
        done = 0
        for piece in pieces:
            wanted = [piece, across] if dim == 0 else [across, piece]
            begin = [done, 0] if dim == 0 else [0, done]
            for part in self.parts:
                spans, place = [part.rows, part.columns], [0, 0]
                for axis in range(2):
                    start = max(wanted[axis].start, part.at[axis])
                    stop = min(wanted[axis].stop, part.at[axis] + len(spans[axis]))
                    place[axis] = begin[axis] + start - wanted[axis].start
                    shift = spans[axis].start - part.at[axis]
                    spans[axis] = range(start + shift, stop + shift)
                if spans[0] and spans[1]:
                    yield place, part, spans[0], spans[1]
            done += len(piece)
