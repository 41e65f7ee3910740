# SPDX-License-Identifier: Apache-2.0
"""Tensors that stay on disk until some of their rows or columns are read.

All formats meet here: a tensor is a run of bytes in a file (`Stored`), and a canonical tensor is assembled
from rectangles of such runs (`Assembled`). Reading uses plain reads into new memory, not memory maps: memory
holds only what was asked for, and a file that shrinks is an error, not a crash. Describing a tensor needs no
torch; reading one does.

Not here: where the runs are (the format modules) and what they mean (rules.py, weights.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 20  # bytes read at once if only some columns are wanted; small enough for the cache
READ_LIMIT = 1 << 30  # bytes per read call; Linux stops at 2 GiB
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
              "int8": 1, "uint8": 1, "bool": 1}
"""Bytes of one number by the name of its dtype."""
FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of that name, e.g. `bfloat16`."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


@dataclass(frozen=True)
class Stored:
    """A tensor [rows, columns] or [rows] whose first byte is at `offset` of the file `path`.

    Numbers are stored row by row, or column by column if it is `transposed`. `kind` is the name of the dtype.
    """

    path: Path
    offset: int
    kind: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.kind)

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.kind]

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize

    @property
    def flipped(self) -> Stored:
        """The transpose; the same bytes."""
        return Stored(self.path, self.offset, self.kind, self.shape[::-1], not self.transposed)

    def window(self, first: int, shape: tuple[int, ...]) -> Stored:
        """Return the tensor that starts at element `first` of this one's bytes."""
        return Stored(self.path, self.offset + first * self.itemsize, self.kind, shape)

    def read(self, rows: range, columns: range) -> torch.Tensor:
        """Read a rectangle [rows, columns]; a vector has one column."""
        import torch

        out = torch.empty(len(rows), len(columns), dtype=self.dtype)
        self.read_into(out, rows, columns)
        return out

    def read_into(self, out: torch.Tensor, rows: range, columns: range) -> None:
        """Read a rectangle into `out` [rows, columns], which may be a view into a larger tensor.

        Raises:
            ModelLinkError: the file is truncated.
        """
        import torch

        if self.transposed:
            out.copy_(self.flipped.read(columns, rows).T)
            return
        row_bytes = self.columns * self.itemsize
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
                raise ModelLinkError(f"the file ends at byte {offset + done}, in the middle of a tensor",
                                     where=self.path, fix="it is truncated or still being written; copy it again")
            done += count


@dataclass(frozen=True)
class Part:
    """A rectangle of a stored tensor, and the position (row, column) of its first element in the assembled
    tensor."""

    stored: Stored
    rows: range
    columns: range
    at: tuple[int, int]


@dataclass(frozen=True)
class Assembled:
    """A tensor [rows, columns] or [rows] assembled from parts that do not overlap; if it is `sparse`, the
    rest is zero."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    sparse: bool = False

    @property
    def kind(self) -> str:
        """Name of the dtype; if the parts differ, the smallest one that holds them all exactly."""
        kinds = {part.stored.kind for part in self.parts}
        if len(kinds) == 1:
            return kinds.pop()
        import torch

        return dtype_name(reduce(torch.promote_types, map(torch_dtype, sorted(kinds))))

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.kind)

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.kind]

    @property
    def transposed(self) -> bool:
        """Whether its rows are columns in the file."""
        return any(part.stored.transposed for part in self.parts)

    def files(self) -> set[Path]:
        """Return the files it is stored in."""
        return {part.stored.path for part in self.parts}

    def check(self) -> None:
        """Raise a ModelLinkError unless the parts cover the tensor."""
        if self.sparse:
            return
        covered = sum(len(part.rows) * len(part.columns) for part in self.parts)
        if covered != prod(self.shape):
            raise ModelLinkError(f"{self.name} should have the shape {list(self.shape)}, that is "
                                 f"{prod(self.shape):,} "
                                 f"numbers; {covered:,} were found",
                                 where=self.parts[0].stored.path if self.parts else None)

    def read(self, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        """Read index ranges along `dim`, concatenated in order; of the other dimension `across`, or all of
        it."""
        import torch

        size = [self.shape[0], prod(self.shape[1:])]
        across = range(size[1 - dim]) if across is None else across
        size[dim], size[1 - dim] = sum(map(len, pieces)), len(across)
        out = (torch.zeros if self.sparse else torch.empty)(size, dtype=self.dtype)
        for place, part, rows, columns in self._overlaps(pieces, dim, across):
            view = out[place[0]:place[0] + len(rows), place[1]:place[1] + len(columns)]
            part.stored.read_into(view, rows, columns)
        return out.view(-1) if len(self.shape) == 1 else out

    def _overlaps(self, pieces: Sequence[range], dim: int,
                  across: range) -> Iterator[tuple[list[int], Part, range, range]]:
        """Yield (position in the output, part, its rows, its columns) for every overlap of a piece with a
        part."""
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
