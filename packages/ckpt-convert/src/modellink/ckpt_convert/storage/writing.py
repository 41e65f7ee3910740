# SPDX-License-Identifier: Apache-2.0
"""Writing files in which every byte has its position before the first tensor is read.

A format gives the fixed bytes and the position of each tensor (`FileLayout`). The file is allocated at its
full size first, so that a full disk is an error before anything is written; then threads fill in tensors
block by block. Writeback of a tensor starts as soon as it is complete, so that the final fsync has little to
wait for. Memory holds at most one block per thread. Each tensor gets a checksum, and a zip archive also the
CRC of each record (by isal, ten times as fast as zlib, which took most of the CPU time).

Not here: the formats themselves (archive.py, safetensors.py) and the content of a tensor (blocks.py).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from isal import isal_zlib

from modellink.ckpt_convert.storage.tensors import as_bytes
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import start_writeback

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `blocks` yields contiguous tensors whose concatenated bytes are its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def made(self) -> torch.Tensor:
        """Return the complete tensor."""
        import torch

        return torch.cat([block.reshape(-1) for block in self.blocks()]).view(self.shape)


@dataclass(frozen=True)
class Slot:
    """The position of a tensor, and the positions of its CRC-32 (4 bytes, little-endian)."""

    name: str
    offset: int
    planned: Planned
    crcs: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileLayout:
    """The content of a file: its size, the fixed bytes, the positions of its tensors."""

    size: int
    fixed: tuple[tuple[int, bytes], ...]
    slots: tuple[Slot, ...]

    def shifted(self, start: int) -> FileLayout:
        """Return the layout of the same content at `start` of a larger file."""
        slots = tuple(replace(slot, offset=slot.offset + start, crcs=tuple(crc + start for crc in slot.crcs))
                      for slot in self.slots)
        return FileLayout(self.size, tuple((offset + start, content) for offset, content in self.fixed),
                          slots)


def write(handle: int, layout: FileLayout, pool: Executor, wrote: Callable[[int], None],
          where: Path) -> dict[str, str]:
    """Fill the new file of descriptor `handle`, and return tensor name -> xxh3_64.

    Args:
        wrote: called with the number of bytes of each block written.
        where: path of the file, for errors.

    Raises:
        ModelLinkError: the disk is full.
    """
    _reserve(handle, layout.size, where)
    for offset, content in layout.fixed:
        _write_at(handle, memoryview(content), offset)
    stop = threading.Event()

    def fill(slot: Slot) -> tuple[str, str]:
        return slot.name, _fill(handle, slot, wrote, stop)

    futures = [pool.submit(fill, slot) for slot in layout.slots]
    try:
        return dict(future.result() for future in futures)
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise


def _fill(handle: int, slot: Slot, wrote: Callable[[int], None], stop: threading.Event) -> str:
    checksum, crc, offset = xxhash.xxh3_64(), 0, slot.offset
    for block in slot.planned.blocks():
        if stop.is_set():
            break
        view = as_bytes(block)
        _write_at(handle, view, offset)
        checksum.update(view)
        crc = isal_zlib.crc32(view, crc) if slot.crcs else 0
        offset += len(view)
        wrote(len(view))
        del view, block  # before the next one is made
    else:
        assert offset - slot.offset == slot.planned.nbytes, (slot.name, offset - slot.offset, slot.planned)
    start_writeback(handle, slot.offset, offset - slot.offset)
    for place in slot.crcs:
        _write_at(handle, memoryview(crc.to_bytes(4, "little")), place)
    return checksum.hexdigest()


def _reserve(handle: int, size: int, where: Path) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ModelLinkError(f"the disk has no space for a file of {size:,} bytes", where=where) from None
        os.ftruncate(handle, size)  # a file system that cannot reserve


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
