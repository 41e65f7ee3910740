# SPDX-License-Identifier: Apache-2.0
"""The layout of a file for `torch.load`, made from names, dtypes and shapes before any tensor exists.

A zip archive of uncompressed records: `archive/data.pkl` (a pickle of protocol 2, storages as persistent
ids), `archive/data/KEY` aligned to 64 bytes as torch does, so that `torch.load(mmap=True)` works. Equal
content gives equal bytes (no time stamps). Records have a correct CRC, which torch ignores but other tools
check.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

from modellink.ckpt_convert.storage.tensors import dtype_name
from modellink.ckpt_convert.storage.writing import FileLayout, Planned, Slot

ALIGNMENT = 64
LARGE = 0xFFFFFFFF  # in a 32-bit field of a zip archive: see the 64-bit field
DATE = 0x21  # 1980-01-01
STORAGE_CLASSES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
                   "float64": "DoubleStorage"}


@dataclass(frozen=True)
class _Storage:
    """Stands for a storage in the pickle."""

    key: str
    planned: Planned


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[_Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            import torch

            storage_class = getattr(torch, STORAGE_CLASSES[dtype_name(obj.planned.dtype)])
            return ("storage", storage_class, obj.key, "cpu", prod(obj.planned.shape))
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Planned):
            return NotImplemented
        import torch

        storage = _Storage(str(len(self.storages)), obj)
        self.storages.append(storage)
        stride = tuple(prod(obj.shape[axis + 1:]) for axis in range(len(obj.shape)))
        hooks: OrderedDict[str, object] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, hooks)


def named(value: Any, prefix: str = "") -> dict[int, str]:
    """Return id -> path of keys (`model.decoder.final_layernorm.weight`) of each `Planned` in nested
    mappings."""
    if isinstance(value, Planned):
        return {id(value): prefix or "tensor"}
    found: dict[int, str] = {}
    for key, inner in value.items() if isinstance(value, dict) else ():
        found |= named(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def layout(value: Any, name: str = "") -> FileLayout:
    """Return the archive of `value`, in which tensors are `Planned`; `name` names a tensor that is not in a
    mapping."""
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(value)
    names = named(value, name)
    made = _Archive()
    made.add("archive/data.pkl", body.getvalue())
    made.add("archive/byteorder", b"little")
    for storage in pickler.storages:
        made.reserve(f"archive/data/{storage.key}", storage.planned, names[id(storage.planned)])
    made.add("archive/version", b"3\n")
    return made.finished()


class _Archive:
    """Local headers and records in order, then the directory; the positions of the tensors' CRCs are
    recorded."""

    def __init__(self) -> None:
        self.at = 0
        self.fixed: list[tuple[int, bytes]] = []
        self.entries: list[tuple[bytes, int, int, int]] = []  # name, CRC, size, offset of the local header
        # entry, name, offset, tensor, position of the local CRC
        self.waiting: list[tuple[int, str, int, Planned, int]] = []

    def add(self, name: str, content: bytes) -> None:
        start = self._header(name, len(content), zlib.crc32(content))
        self.fixed.append((start, content))

    def reserve(self, name: str, planned: Planned, called: str) -> None:
        place = self.at + 14
        start = self._header(name, planned.nbytes, 0)
        self.waiting.append((len(self.entries) - 1, called, start, planned, place))

    def _header(self, name: str, size: int, crc: int) -> int:
        """Add a local header with 64-bit sizes, padded so that the record starts at a multiple of 64."""
        encoded = name.encode()
        wide = struct.pack("<HHQQ", 1, 16, size, size)
        padding = -(self.at + 30 + len(encoded) + len(wide) + 4) % ALIGNMENT
        extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding + wide
        header = struct.pack("<4sHHHHHLLLHH", b"PK\x03\x04", 45, 0, 0, 0, DATE, crc, LARGE, LARGE,
                             len(encoded), len(extra))
        self.fixed.append((self.at, header + encoded + extra))
        self.entries.append((encoded, crc, size, self.at))
        start = self.at + len(header) + len(encoded) + len(extra)
        self.at = start + size
        return start

    def finished(self) -> FileLayout:
        directory, places = b"", []
        for name, crc, size, offset in self.entries:
            places.append(self.at + len(directory) + 16)
            sizes, where = min(size, LARGE), min(offset, LARGE)
            wide = struct.pack("<QQ", size, size) if size >= LARGE else b""
            wide += struct.pack("<Q", offset) if offset >= LARGE else b""
            extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
            directory += struct.pack("<4sHHHHHHLLLHHHHHLL", b"PK\x01\x02", 45, 45, 0, 0, 0, DATE, crc, sizes,
                                     sizes, len(name), len(extra), 0, 0, 0, 0, where) + name + extra
        end = self.at + len(directory)
        count, size = len(self.entries), len(directory)
        tail = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, self.at)
        tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
        tail += struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                            min(size, LARGE), min(self.at, LARGE), 0)
        self.fixed.append((self.at, directory + tail))
        slots = (Slot(called, start, planned, (place, places[entry]))
                 for entry, called, start, planned, place in self.waiting)
        return FileLayout(end + len(tail), tuple(self.fixed), tuple(slots))
