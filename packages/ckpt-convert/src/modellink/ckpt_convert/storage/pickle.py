# SPDX-License-Identifier: Apache-2.0
"""Our own reader of what `torch.save` writes: nothing in the file is executed, and tensors stay on disk.

A torch.save file is a zip archive without compression: `NAME/data.pkl` is a pickle in which storages are
persistent ids, `NAME/data/KEY` are their bytes. Every global that the pickle names becomes an inert object
that records its arguments, except for a short list below, which is replaced by functions of ours without side
effects. A tensor becomes a `Stored`: file, byte offset, dtype, shape.

The archive may be a part of a larger file, as in `torch.distributed.checkpoint`. Not here: older torch.save
formats (not a zip), and tensors with other strides than a matrix or its transpose has. A hostile pickle can
still use a lot of memory, but nothing else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from modellink.ckpt_convert.storage.tensors import ITEM_BYTES, Stored
from modellink.kernels.errors import ModelLinkError

STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
            "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
            "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}
DTYPES = frozenset(STORAGES.values())


class Inert:
    """Stands for an object whose class or function is not called: it records the arguments and has no
    behavior."""

    name = ""  # module.qualified_name in the pickle

    def __init__(self, *args: Any) -> None: ...

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state, self.items = args, {}, {}
        return self

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Iterable[Any]) -> None:
        for value in values:
            self.append(value)

    add = append

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True)
class Record:
    """A storage: `numel` numbers of dtype `kind` from `offset` of the file."""

    path: Path
    offset: int
    kind: str
    numel: int


def _tensor(record: object, offset: object, shape: Any, stride: Any, *_: object) -> Stored:
    """torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks)"""
    if not isinstance(record, Record) or not isinstance(offset, int):
        raise ValueError("a tensor without a storage")
    shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
    transposed = len(shape) == 2 and not _row_major(shape, stride) and _row_major(shape[::-1], stride[::-1])
    if not transposed and not _row_major(shape, stride):
        raise ValueError(f"a tensor {list(shape)} with strides {list(stride)} is neither row-major nor "
                         f"column-major")
    if min((offset, *shape)) < 0 or offset + prod(shape) > record.numel:
        raise ValueError(f"a tensor {list(shape)} exceeds its storage of {record.numel} elements")
    return Stored(record.path, record.offset + offset * ITEM_BYTES[record.kind], record.kind, shape,
                  transposed)


def _row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = (prod(shape[axis + 1:]) for axis in range(len(shape)))
    return all(step == wanted or size <= 1 for step, wanted,
               size in zip(stride, expected, shape, strict=True))


def _parameter(data: object, *_: object) -> object:
    """torch._utils._rebuild_parameter(data, requires_grad, backward_hooks)"""
    return data


SAFE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict, "builtins.set": set, "__builtin__.set": set,
    "torch.Size": lambda sizes=(): tuple(map(int, sizes)),
    "torch._utils._rebuild_tensor_v2": _tensor, "torch._utils._rebuild_parameter": _parameter}


class Reader(pickle.Unpickler):
    """An unpickler that calls only the functions above; `storage` finds a record by its key."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, str, int], Record] | None = None) -> None:
        super().__init__(file)
        self._storage = storage
        self.names: set[str] = set()
        self._stand_ins: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        self.names.add(full)
        if full in SAFE:
            return SAFE[full]
        if module == "torch" and name in DTYPES:
            return name
        if full not in self._stand_ins:
            self._stand_ins[full] = type("Inert", (Inert,), {"name": full})
        return self._attribute if full == "builtins.getattr" else self._stand_ins[full]

    def _attribute(self, *args: Any) -> Inert:
        """Record a getattr, with which Python 3.11.0 to 3.11.3 pickle an enum member, as another name."""
        self.names.add(".".join(str(getattr(part, "name", part)) for part in args))
        return self._stand_ins["builtins.getattr"](*args)

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None or not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError(f"an unknown kind of reference {pid!r}")
        _, kind, key, _, numel = pid
        storage = getattr(kind, "name", "").rpartition(".")[2]
        if storage not in STORAGES or not isinstance(numel, int):
            raise ValueError(f"an unsupported storage {kind!r}")
        return self._storage(str(key), STORAGES[storage], numel)


def read_pickle(path: Path) -> Any:
    """Read a bare pickle without tensors, e.g. `.metadata` of torch.distributed.checkpoint."""
    with open(path, "rb") as file:
        return _guarded(path, lambda: Reader(file).load())


def names(path: Path) -> set[str]:
    """Return the `module.name` of everything a bare pickle refers to, without calling any of it."""
    with open(path, "rb") as file:
        reader = Reader(file)
        _guarded(path, reader.load)
    return reader.names


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Read what `torch.save` wrote to `path`, or to `length` bytes of it from `start`.

    Tensors are returned as `Stored`, dtypes as their names, unknown objects as `Inert`.

    Raises:
        ModelLinkError: the file is missing, truncated, compressed, or not a torch.save archive.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ModelLinkError("a file is missing", where=path) from None
    length = size - start if length is None else length
    if start < 0 or length < 0 or start + length > size:
        raise ModelLinkError(f"bytes {start} to {start + length} are needed, the file has {size}", where=path,
                             fix="it is truncated; copy it again")
    with open(path, "rb", buffering=0) as raw:
        return _guarded(path, lambda: _Archive(path, raw, start, length).load())


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ModelLinkError:
        raise
    except zipfile.BadZipFile:
        raise ModelLinkError("not a complete torch.save archive", where=path,
                             fix="it is truncated, or written by a torch older than 1.6; copy or save it again") from None
    except FileNotFoundError:
        raise ModelLinkError("a file is missing", where=path) from None
    except Exception as error:  # whatever a broken pickle makes the unpickler raise
        raise ModelLinkError(f"its pickle cannot be read: {type(error).__name__}: {error}",
                             where=path) from None


class _Archive:
    def __init__(self, path: Path, raw: io.FileIO, start: int, length: int) -> None:
        self.path, self.raw, self.start, self.length = path, raw, start, length
        self.zip = zipfile.ZipFile(io.BufferedReader(_Window(raw, start, length)))
        pickles = [name for name in self.zip.namelist() if name.endswith("/data.pkl")
                   and name.count("/") == 1]
        if len(pickles) != 1:
            raise zipfile.BadZipFile
        self.root = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        offset, size = self._locate(self.root + "data.pkl")
        return Reader(io.BytesIO(self._bytes(offset, size)), self._record).load()

    def _record(self, key: str, kind: str, numel: int) -> Record:
        if self.root + "byteorder" in self.zip.NameToInfo and self._bytes(*self._locate(self.root + "byteorder")) != b"little":
            raise ModelLinkError("its numbers are big-endian", where=self.path)
        offset, size = self._locate(f"{self.root}data/{key}")
        if not 0 <= numel * ITEM_BYTES[kind] <= size:
            raise ModelLinkError(f"storage {key} has {size} bytes, too few for {numel} elements of {kind}",
                                 where=self.path)
        return Record(self.path, offset, kind, numel)

    def _locate(self, name: str) -> tuple[int, int]:
        """Return offset in the file and size of a record; the lengths in its local header move the offset."""
        info = self.zip.NameToInfo.get(name)
        if info is None:
            raise ModelLinkError(f"the record {name} is missing from the archive", where=self.path)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ModelLinkError(f"the record {name} is compressed", where=self.path,
                                 fix="save it with torch.save")
        header = self._bytes(self.start + info.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile
        extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        offset = self.start + info.header_offset + 30 + extra
        if offset + info.file_size > self.start + self.length:
            raise zipfile.BadZipFile
        return offset, info.file_size

    def _bytes(self, offset: int, size: int) -> bytes:
        self.raw.seek(offset)
        return self.raw.read(size)


class _Window(io.RawIOBase):
    """A part of a file as a file object."""

    def __init__(self, raw: io.FileIO, start: int, length: int) -> None:
        self._raw, self._start, self._length, self._at = raw, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[:max(0, self._length - self._at)]
        self._raw.seek(self._start + self._at)
        count = self._raw.readinto(view)
        self._at += count
        return count
