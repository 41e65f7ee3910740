"""Writing what `torch.load` reads, one tensor in memory at a time.

`torch.save` wants the whole state in memory; here the pickle is made from names, dtypes and shapes, and each tensor is asked
for when its record is written. The same content gives the same bytes (no time stamps). Format: a zip archive of stored
records, `archive/data.pkl` (protocol 2, storages as persistent ids), `archive/data/KEY`, aligned to 64 bytes as
torch does, so that `torch.load(mmap=True)` works.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import torch

from modellink.ckpt_convert.formats.tensors import as_bytes

ALIGNMENT = 64
STORAGE_CLASSES: dict[torch.dtype, Any] = {
    torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `fetch` makes it when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def made(self) -> torch.Tensor:
        """The tensor itself, contiguous."""
        tensor = self.fetch()
        assert tuple(tensor.shape) == self.shape and tensor.dtype == self.dtype, (tensor.shape, tensor.dtype, self)
        return tensor.contiguous()


@dataclass(frozen=True)
class _Storage:
    """Stands for a record in the pickle."""

    key: str
    planned: Planned


class _Pickler(pickle.Pickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[_Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", STORAGE_CLASSES[obj.planned.dtype], obj.key, "cpu", prod(obj.planned.shape))
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Planned):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), obj)
        self.storages.append(storage)
        stride = tuple(prod(obj.shape[axis + 1:]) for axis in range(len(obj.shape)))
        hooks: OrderedDict[str, object] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, hooks)


def save(file: IO[bytes], value: Any, wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write `value`, in which tensors are `Planned`, to a seekable `file`; `wrote` is told the bytes of each tensor."""
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(value)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, file, "archive/data.pkl", body.getbuffer())
        _record(archive, file, "archive/byteorder", memoryview(b"little"))
        for storage in pickler.storages:
            _record(archive, file, f"archive/data/{storage.key}", as_bytes(storage.planned.made()))
            wrote(storage.planned.nbytes)
        _record(archive, file, "archive/version", memoryview(b"3\n"))


def _record(archive: zipfile.ZipFile, file: IO[bytes], name: str, content: memoryview) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980-01-01
    zip64 = 20  # bytes of the extra field that force_zip64 adds to the local header
    start = file.tell() + 30 + len(name) + zip64 + 4
    padding = -start % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(content)
