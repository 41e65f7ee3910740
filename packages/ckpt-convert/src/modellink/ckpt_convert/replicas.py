# SPDX-License-Identifier: Apache-2.0
"""Weights that several ranks of a Megatron checkpoint hold: norms over tensor-parallel ranks, everything but experts over
expert-parallel ranks, the copy of a tied embedding on the last stage.

Copies are equal in a correct run; if they are not, no conversion can keep both. They are compared in blocks. Not here: which
weights have copies (megatron/model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modellink.ckpt_convert.source import SHOWN, Checkpoint
from modellink.ckpt_convert.storage.tensors import Assembled, as_bytes
from modellink.ckpt_convert.verify import file_of
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import note

BLOCK = 16 << 20  # bytes compared at once


def check_replicas(source: Checkpoint, *, allow_diverged: bool = False) -> None:
    """Compare all copies of each weight bit by bit.

    Args:
        allow_diverged: use the first copy, and name the weights in a note.

    Raises:
        ModelLinkError: copies differ; the error names weights and files.
    """
    found = list(_diverged(source))
    if not found:
        return
    names = ", ".join(name for name, _ in found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    if allow_diverged:
        note(f"the ranks hold different copies of {names}; the first copy is used")
        return
    first, second = found[0][1]
    raise ModelLinkError(f"the ranks hold different copies of {names}", where=f"{first}, {second}", option="allow_diverged",
                         fix="the run that saved them diverged, or files of two runs were mixed; --allow-diverged first takes "
                             "the first copy")


def _diverged(source: Checkpoint) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Yield each weight whose copies differ, with the files of the first difference."""
    for name, (first, *others) in source.copies.items():
        for other in others:
            if (row := _difference(first, other)) is not None:
                files = (file_of(copy, (row,)) or source.folder for copy in (first, other))
                yield name, (next(files), next(files))
                break


def _difference(first: Assembled, second: Assembled) -> int | None:
    """Return the first row that differs."""
    if first.kind != second.kind:
        return 0
    row_bytes = first.itemsize * (first.shape[1] if len(first.shape) > 1 else 1)
    step = max(1, BLOCK // max(1, row_bytes))
    for start in range(0, first.shape[0], step):
        rows = [range(start, min(start + step, first.shape[0]))]
        mine, theirs = first.read(rows, 0), second.read(rows, 0)
        if as_bytes(mine) != as_bytes(theirs):
            return next((start + row for row in range(len(mine)) if as_bytes(mine[row]) != as_bytes(theirs[row])), start)
    return None
