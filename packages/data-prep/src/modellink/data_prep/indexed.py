# SPDX-License-Identifier: Apache-2.0
"""Reader and writer of Megatron's indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx the sequence bounds.

The index, all little endian: 9 bytes `MMIDIDX\\0\\0`; u64 version 1; u8 code of the token type; u64 number of sequences; u64
number of document boundaries (documents + 1); int32 length of each sequence; int64 byte offset of each sequence in the .bin;
int64 boundaries (sequence numbers; the first is 0, the last the number of sequences). Source: megatron-core 0.16.1,
`megatron/core/datasets/indexed_dataset.py`. Not here: the optional int8 mode of each sequence (multimodal), and S3.

Writing streams both files in constant memory. They appear only when complete, the .idx last: a .bin without .idx is unfinished.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import atomic_write, kill_point

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
                                   5: np.dtype("<i8"), 6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2")}
SMALL_VOCABULARY = 65_500  # below this vocabulary size Megatron stores an id in two bytes
CHUNK = 1 << 20  # index entries checked per step


def token_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """Return the type in which Megatron stores ids of this vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


def files_of(prefix: Path | str) -> tuple[Path, Path]:
    """Return the .bin and .idx paths of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedWriter:
    """Context manager that writes one dataset; if the block raises, no file appears.

    An existing dataset of that name is replaced.

    Args:
        durable: wait until the files are on the disk. Otherwise a power cut may leave truncated files.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any], *, durable: bool = True) -> None:
        self.prefix, self.dtype, self._durable = Path(prefix), np.dtype(dtype), durable
        self._code = next((code for code, known in CODES.items() if known == self.dtype), 0)
        if not self._code:
            raise ModelLinkError(f"an indexed dataset cannot hold {self.dtype}", where=prefix)
        self.sequences = self.documents = self.tokens = 0
        self._stack = ExitStack()

    def __enter__(self) -> IndexedWriter:
        bin_path, _ = files_of(self.prefix)
        self._bin: IO[bytes] = self._stack.enter_context(atomic_write(bin_path, durable=self._durable))
        # Unnamed files: they disappear with the process, however it ends.
        with ExitStack() as nameless:
            self._lengths = nameless.enter_context(tempfile.TemporaryFile(dir=bin_path.parent))
            self._boundaries = nameless.enter_context(tempfile.TemporaryFile(dir=bin_path.parent))
            self._nameless = nameless.pop_all()
        return self

    def add_document(self, *sequences: ArrayLike) -> None:
        """Add a document of one or more sequences of token ids.

        Raises:
            ModelLinkError: an id does not fit the type.
        """
        for sequence in sequences:
            array = np.asarray(sequence)
            self._bin.write(self._fitting(array).tobytes())
            self._lengths.write(struct.pack("<i", array.size))
            self.sequences += 1
            self.tokens += array.size
        self.documents += 1
        self._boundaries.write(struct.pack("<q", self.sequences))

    def add_documents(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Add documents of one sequence each; `tokens` are those of all documents, concatenated. Empty documents are skipped.

        Raises:
            ModelLinkError: an id does not fit the type.
        """
        self._bin.write(np.ascontiguousarray(self._fitting(tokens)).data)
        sizes = lengths[lengths > 0]
        self._lengths.write(sizes.astype("<i4").tobytes())
        self._boundaries.write(np.arange(self.sequences + 1, self.sequences + len(sizes) + 1, dtype="<i8").tobytes())
        self.sequences += len(sizes)
        self.documents += len(sizes)
        self.tokens += len(tokens)

    def _fitting(self, array: NDArray[Any]) -> NDArray[Any]:
        if array.size and self.dtype.kind in "iu":
            limits, theirs = np.iinfo(self.dtype), np.iinfo(array.dtype)
            if (theirs.min < limits.min and array.min() < limits.min) or (theirs.max > limits.max and array.max() > limits.max):
                raise ModelLinkError(f"token ids from {array.min()} to {array.max()} do not fit {self.dtype}",
                                     where=self.prefix, fix="write int32 (--output-dtype int32)")
        return array.astype(self.dtype, copy=False)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset of the same type."""
        if dataset.dtype != self.dtype:
            raise ModelLinkError(f"the token type is {dataset.dtype}, that of the output is {self.dtype}", where=dataset.prefix,
                                 fix="write both with the same --output-dtype")
        with files_of(dataset.prefix)[0].open("rb") as source:
            shutil.copyfileobj(source, self._bin, 1 << 20)
        for part in _chunks(dataset.lengths):
            self._lengths.write(part.tobytes())
        for part in _chunks(dataset.boundaries[1:]):
            self._boundaries.write((part + self.sequences).astype("<i8").tobytes())
        self.sequences += len(dataset)
        self.documents += dataset.document_count
        self.tokens += dataset.token_count

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._nameless:
            if kind is None:
                # The old index is removed first, so that an index never appears next to tokens it does not belong to.
                files_of(self.prefix)[1].unlink(missing_ok=True)
            self._stack.__exit__(kind, error, trace)
            if kind is None:
                kill_point("before-index")
                self._write_index()

    def _write_index(self) -> None:
        with atomic_write(files_of(self.prefix)[1], durable=self._durable) as file:
            file.write(HEADER.pack(MAGIC, VERSION, self._code, self.sequences, self.documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, file, 1 << 20)
            self._lengths.seek(0)
            offset = 0
            while part := self._lengths.read(4 * CHUNK):
                ends = np.cumsum(np.frombuffer(part, "<i4"), dtype="<i8") * self.dtype.itemsize + offset
                file.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            file.write(struct.pack("<q", 0))
            self._boundaries.seek(0)
            shutil.copyfileobj(self._boundaries, file, 1 << 20)


class IndexedDataset:
    """A dataset on disk, memory-mapped.

    Attributes:
        dtype: type of the tokens.
        lengths: tokens of each sequence, int32 [sequences].
        offsets: start of each sequence in the .bin in bytes, int64 [sequences].
        boundaries: first sequence of each document, then the number of sequences, int64 [documents + 1].

    Raises:
        ModelLinkError: a file is missing or unfinished, is not an index, or index and tokens do not match.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx"))
        bin_path, idx_path = files_of(self.prefix)
        for path, other in ((bin_path, idx_path), (idx_path, bin_path)):
            if not path.is_file():
                raise ModelLinkError("the dataset is unfinished: one of its two files is missing" if other.is_file()
                                     else "the dataset does not exist", where=path, fix="give the path without .bin or .idx")
        size = idx_path.stat().st_size
        with idx_path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ModelLinkError("not an index of a Megatron dataset", where=idx_path)
        _, version, code, sequences, boundaries = HEADER.unpack(head)
        if version != VERSION or code not in CODES:
            raise ModelLinkError(f"unknown version {version} or token type {code}", where=idx_path)
        self.dtype = CODES[code]
        wanted = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (wanted, wanted + sequences):  # with the modes of a multimodal set
            raise ModelLinkError(f"the index has {size:,} bytes, its header implies {wanted:,}", where=idx_path,
                                 fix="the file is truncated or damaged; copy or create it again")
        index = np.memmap(idx_path, mode="r")
        parts = np.split(index[HEADER.size:wanted], [4 * sequences, 12 * sequences])
        self.lengths, self.offsets, self.boundaries = (
            part.view(kind) for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True))
        self._check(bin_path, idx_path)
        empty = np.zeros(0, self.dtype)
        self.tokens: NDArray[Any] = np.memmap(bin_path, self.dtype, mode="r") if self.token_count else empty

    def _check(self, bin_path: Path, idx_path: Path) -> None:
        offset = 0
        for number, (lengths, offsets) in enumerate(zip(_chunks(self.lengths), _chunks(self.offsets), strict=True)):
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + offset
            wrong = (lengths < 0) | (offsets != np.concatenate([[offset], ends[:-1]]))
            if wrong.any():
                raise ModelLinkError(f"sequence {number * CHUNK + int(wrong.argmax())} does not begin where the previous one "
                                     "ends", where=idx_path, fix="create the dataset again")
            offset = int(ends[-1])
        self.token_count = offset // self.dtype.itemsize
        if (size := bin_path.stat().st_size) != offset:
            raise ModelLinkError(f"the tokens take {size:,} bytes, the index implies {offset:,}", where=bin_path,
                                 fix="one of the two files is truncated or belongs to another dataset; create it again")
        steps = self.boundaries
        falls = any((np.diff(steps[at:at + CHUNK + 1]) < 0).any() for at in range(0, len(steps) - 1, CHUNK))
        if not len(steps) or steps[0] != 0 or steps[-1] != len(self) or falls:
            raise ModelLinkError("the documents do not cover the sequences from first to last", where=idx_path,
                                 fix="create the dataset again")

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    @property
    def document_count(self) -> int:
        return len(self.boundaries) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the tokens of a sequence, [length], read-only."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start:start + int(self.lengths[index])]

    def document(self, index: int) -> list[NDArray[Any]]:
        """Return the sequences of a document."""
        if not 0 <= index < self.document_count:
            raise IndexError(f"document {index} of {self.document_count}")
        return [self[item] for item in range(int(self.boundaries[index]), int(self.boundaries[index + 1]))]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start:start + CHUNK] for start in range(0, len(array), CHUNK))


def checksum(path: Path) -> int | None:
    """Return the CRC-32 of a file, or None if it does not exist."""
    found = 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                found = zlib.crc32(chunk, found)
    except FileNotFoundError:
        return None
    return found


def existing(prefixes: Sequence[Path]) -> list[Path]:
    """Return the files of these datasets that exist."""
    return [path for prefix in prefixes for path in files_of(prefix) if path.exists()]
