# SPDX-License-Identifier: Apache-2.0
"""Comparing two checkpoints tensor by tensor, of any formats and layouts.

`compare` is `--verify`: every bit of the output against the source. `differences` is `modellink-convert
diff`: all differences between two checkpoints of the same or of different models. Both read blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.ckpt_convert.blocks import cast
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage.tensors import Assembled, as_bytes
from modellink.kernels.errors import InternalError
from modellink.kernels.progress import Work

if TYPE_CHECKING:
    import torch

BLOCK = 16 << 20  # bytes compared at once


@dataclass(frozen=True)
class Difference:
    """A weight that differs: how, and the file of the second checkpoint with the first differing value."""

    name: str
    what: str
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}" + (f" ({self.file})" if self.file else "")


def compare(source: Checkpoint, target: Checkpoint, dtype: torch.dtype | None = None, *,
            show: bool = True) -> int:
    """Compare every weight of `target` with that of `source` (cast to `dtype`), and return their number.

    Raises:
        InternalError: a weight differs; the error names tensor, file and index.
    """
    source.spec.refuse_contradiction(target.spec, str(source.folder), str(target.folder))
    with Work("verifying", len(source.tensors), unit="tensors", show=show) as work:
        for name in source.tensors:
            if found := _values(source, target, name, dtype):
                raise InternalError(f"{name} differs: {found.what}", where=found.file or target.folder)
            work.advance()
    return len(source.tensors)


def differences(first: Checkpoint, second: Checkpoint, *, show: bool = True) -> Iterator[Difference]:
    """Yield every weight that only one of them has, or whose shape, dtype or values differ."""
    names = list(dict.fromkeys([*first.tensors, *second.tensors]))
    with Work("comparing", len(names), unit="tensors", show=show) as work:
        for name in names:
            work.advance()
            if name not in first.tensors or name not in second.tensors:
                yield Difference(name, f"only in {(first if name in first.tensors else second).folder}")
                continue
            mine, theirs = first.tensors[name], second.tensors[name]
            if mine.shape != theirs.shape:
                yield Difference(name, f"{list(mine.shape)} and {list(theirs.shape)}")
            elif found := _values(first, second, name, None):
                yield found


def _values(source: Checkpoint, target: Checkpoint, name: str,
            dtype: torch.dtype | None) -> Difference | None:
    """Return how the values of a weight differ, compared bit by bit; None if they do not."""
    import torch

    wanted_dtype, found_dtype = dtype or source.dtype(name), target.dtype(name)
    kinds = "" if wanted_dtype == found_dtype else f"{wanted_dtype} and {found_dtype}, "
    shape, count, largest, first = source.tensors[name].shape, 0, 0.0, None
    row_bytes = source.dtype(name).itemsize * (shape[1] if len(shape) > 1 else 1)
    step = max(1, BLOCK // max(1, row_bytes))
    for start in range(0, shape[0], step):
        rows = [range(start, min(start + step, shape[0]))]
        wanted, found = source.read(name, rows, 0), target.read(name, rows, 0)
        wanted = cast(wanted, dtype, name) if dtype else wanted
        if wanted.dtype == found.dtype and as_bytes(wanted) == as_bytes(found):
            continue
        unequal = (wanted.double() != found.double()) & ~(wanted.isnan() & found.isnan())
        if wanted.dtype == found.dtype:
            unequal |= _bits(wanted) != _bits(found)
        if places := unequal.nonzero().tolist():
            count += len(places)
            first = first or (places[0][0] + start, *places[0][1:])
            largest = max(largest,
                          (wanted.double() - found.double()).abs().nan_to_num(nan=torch.inf).max().item())
    if first is None:
        return Difference(name, kinds + "equal values") if kinds else None
    what = f"{count:,} values differ, by at most {largest:.3g}, first at {list(first)}"
    return Difference(name, kinds + what, file_of(target.tensors[name], first))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def file_of(tensor: Assembled, index: tuple[int, ...]) -> Path | None:
    """Return the file that holds the value at an index of a tensor."""
    row, column = index[0], index[1] if len(index) > 1 else 0
    for part in tensor.parts:
        if 0 <= row - part.at[0] < len(part.rows) and 0 <= column - part.at[1] < len(part.columns):
            return part.stored.path
    return None
