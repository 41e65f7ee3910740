"""Writing files whose every byte has its place before the first tensor is read.

A format says which bytes are fixed and where each tensor goes (`FileLayout`); here the file is made at its full size, so that a
full disk is an error before anything else, and threads fill in tensors block by block; each tensor's way to the disk begins when
it is whole, so that the fsync at the end has little to wait for. At no time is more in memory than one block a thread. A checksum
of each tensor is kept, and where a zip archive wants the CRC of a record it is put in afterwards (by isal, ten times as fast as
zlib: the checksum was most of the processor's work).

Not here: the formats themselves (archive.py, safetensors.py) and what a tensor is made of (blocks.py).
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

import torch
import xxhash
from isal import isal_zlib

from modellink.ckpt_convert.formats.tensors import as_bytes
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import start_writeback


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `blocks` gives, when it is its turn, contiguous tensors whose bytes end to end are its own."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def made(self) -> torch.Tensor:
        """The tensor itself."""
        return torch.cat([block.reshape(-1) for block in self.blocks()]).view(self.shape)


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes, and at which places its CRC-32 is wanted (4 bytes, little-endian)."""

    name: str
    offset: int
    planned: Planned
    crcs: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileLayout:
    """All of a file: its size, the bytes that are known, the places of its tensors."""

    size: int
    fixed: tuple[tuple[int, bytes], ...]
    slots: tuple[Slot, ...]

    def shifted(self, start: int) -> FileLayout:
        """The same as a window of a larger file."""
        slots = (replace(slot, offset=slot.offset + start, crcs=tuple(crc + start for crc in slot.crcs)) for slot in self.slots)
        return FileLayout(self.size, tuple((offset + start, content) for offset, content in self.fixed), tuple(slots))


def write(handle: int, layout: FileLayout, pool: Executor, wrote: Callable[[int], None], where: Path) -> dict[str, str]:
    """Fill the new file of descriptor `handle`; `wrote` is told the bytes of each block. Returns name -> xxh3_64 of each tensor.

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
            raise ModelLinkError(f"the disk has no room for a file of {size:,} bytes", where=where) from None
        os.ftruncate(handle, size)  # a file system that cannot reserve


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
