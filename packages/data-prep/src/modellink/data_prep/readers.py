"""Files to rows, streamed: jsonl, json, txt, csv and parquet; jsonl and txt also as .gz.

A source can be cut into spans, and a span is read without reading what is before it: bytes of a line file (a line belongs to
the span its first byte is in), row groups of a parquet file. Compressed, csv and json files are one span each: where a row
starts in them is only known by reading all before it. At most one row, a parquet batch or a few MiB are in memory.

A row that cannot be read is handed out as a `BadRow` and reading goes on where that is possible. A txt file is one row
`{"text": line}` a line, as the original reads it. Not here: which columns matter and what a row means (handlers/).
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, cast

import orjson
import pyarrow
import pyarrow.parquet

from modellink.kernels.errors import ModelLinkError

CHUNK = 1 << 20  # bytes
PEEK = 100  # rows looked at to learn the columns
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class BadRow:
    """A row that is no data, and why."""

    why: str


Row = dict[str, Any] | BadRow
Span = tuple[int, int]  # start and stop, in what the format counts by


class Source(Protocol):
    """One input file.

    `cut` gives its spans of about `size` bytes, `weigh` the bytes of a span, `rows` the rows of a span each with its place
    (a byte or a row number), `name_place` a place in words, `columns` the names in its first rows, or None when unknown.
    """

    path: Path

    def cut(self, size: int) -> list[Span]: ...
    def weigh(self, span: Span) -> int: ...
    def columns(self) -> list[str] | None: ...
    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]: ...
    def name_place(self, place: int) -> str: ...


class Lines:
    """A file of lines; places and spans count bytes (uncompressed ones)."""

    def __init__(self, path: Path, parse: Callable[[bytes], Row | None]) -> None:
        self.path, self._parse = path, parse
        with path.open("rb") as file:
            self._packed = file.read(2) == GZIP

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self._packed else self.path.open("rb")

    def cut(self, size: int) -> list[Span]:
        length = self.path.stat().st_size
        if self._packed:
            return [(0, sys.maxsize)]
        return [(start, min(start + size, length)) for start in range(0, length, size)]

    def weigh(self, span: Span) -> int:
        return self.path.stat().st_size if self._packed else span[1] - span[0]

    def columns(self) -> list[str] | None:
        return _columns(self.rows((0, sys.maxsize), []))

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        start, stop = span
        try:
            with self._open() as file:
                if start and not _seek_line(file, start, stop):
                    return
                position = file.tell()
                while position < stop and (line := file.readline()):
                    body = line[3:] if position == 0 and line.startswith(b"\xef\xbb\xbf") else line
                    if (row := self._parse(body)) is not None:
                        yield position, row
                    position += len(line)
        except (EOFError, zlib.error, OSError) as error:
            raise ModelLinkError(f"the file cannot be read to its end: {error}", where=self.path,
                                 fix="copy or download it anew") from None

    def name_place(self, place: int) -> str:
        count, rest = 1, place
        with self._open() as file:
            while rest and (chunk := file.read(min(CHUNK, rest))):
                count += chunk.count(b"\n")
                rest -= len(chunk)
        return f"{self.path}, line {count}"


def _seek_line(file: BinaryIO, start: int, stop: int) -> bool:
    """Move to the first line that begins at or after `start`; False when none begins before `stop`."""
    file.seek(start - 1)
    position = start - 1
    while position < stop:
        part = file.readline(min(CHUNK, stop - position))
        position += len(part)
        if part.endswith(b"\n"):
            return position < stop
        if not part:
            return False
    return False


def _json_line(line: bytes) -> Row | None:
    if not line.strip():
        return None
    try:
        return _object(orjson.loads(line))
    except orjson.JSONDecodeError as error:
        return BadRow(f"not JSON: {error}")


def _text_line(line: bytes) -> Row | None:
    try:
        return {"text": line.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error}")


def _object(value: object) -> Row:
    return value if isinstance(value, dict) else BadRow(f"a {type(value).__name__} where a JSON object belongs")


def _columns(rows: Iterator[tuple[int, Row]]) -> list[str] | None:
    names: dict[str, None] = {}
    for count, (_, row) in enumerate(rows):
        if count == PEEK:
            break
        if not isinstance(row, BadRow):
            names |= dict.fromkeys(row)
    return list(names) or None


class _Whole:
    """A file that is one span; places are row numbers from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, size: int) -> list[Span]:
        return [(0, 1)] if self.path.stat().st_size else []

    def weigh(self, span: Span) -> int:
        return self.path.stat().st_size

    def name_place(self, place: int) -> str:
        return f"{self.path}, row {place}"


class JsonArray(_Whole):
    """A JSON array of objects, read object by object. What cannot be parsed is read on to the end before it is called broken."""

    def columns(self) -> list[str] | None:
        return _columns(self.rows((0, 1), []))

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                for number, value in enumerate(_elements(file), 1):
                    yield number, _object(value)
        except UnicodeDecodeError as error:
            raise ModelLinkError(f"not UTF-8: {error}", where=f"{self.path}, after row {number}") from None
        except _NotJson as error:
            raise ModelLinkError(f"not a JSON array of objects: {error}", where=self.name_place(number + 1)) from None


class _NotJson(Exception):
    pass


def _elements(file: TextIO) -> Iterator[object]:
    """The elements of the JSON array in `file`; holds the element being read and up to the next chunk."""
    decoder, text, at, next_is = json.JSONDecoder(), "", 0, "["
    while True:
        at = _after_space(text, at)
        head, problem = text[at:at + 1], "it ends too early"
        if next_is == "a value" or (next_is == "a value or ]" and head != "]"):
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                problem = error.msg if head else problem
            else:
                if end < len(text):  # a number at the very end of the chunk may go on in the next one
                    yield value
                    at, next_is = end, ", or ]"
                    continue
        elif head and head not in next_is:
            raise _NotJson(f"{head!r} where {next_is} belongs")
        elif head == "]":
            if (text[at + 1:] + file.read()).strip():
                raise _NotJson("there is something after the end of the array")
            return
        elif head:
            at, next_is = at + 1, "a value or ]" if head == "[" else "a value"
            continue
        more = file.read(max(CHUNK, len(text) - at))
        if not more:
            raise _NotJson(problem)
        text, at = text[at:] + more, 0


def _after_space(text: str, at: int) -> int:
    while text[at:at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


class Csv(_Whole):
    """Comma-separated values with a header line; quoted fields may hold line ends."""

    def columns(self) -> list[str] | None:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return next(csv.reader(file), None)

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        csv.field_size_limit(sys.maxsize)
        # Broken bytes become lone surrogates, so that only the rows that hold them are bad.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.reader(file, strict=True)
            try:
                names = next(lines, [])
                for number, values in enumerate(lines, 1):
                    if not values:
                        continue
                    if len(values) != len(names):
                        yield number, BadRow(f"{len(values)} fields, the header has {len(names)}")
                    else:
                        yield number, dict(zip(names, values, strict=True))
            except csv.Error as error:
                raise ModelLinkError(f"not CSV: {error}", where=f"{self.path}, line {lines.line_num}") from None


class Parquet:
    """A parquet file; spans count row groups, places are row numbers from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._columns = list(file.schema_arrow.names)
                groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise ModelLinkError(f"not a parquet file: {error}", where=path, fix="copy or download it anew") from None
        self._bytes = [group.total_byte_size for group in groups]
        self._first = [1]
        for group in groups:
            self._first.append(self._first[-1] + group.num_rows)

    def cut(self, size: int) -> list[Span]:
        spans, start, weight = [], 0, 0
        for stop, group in enumerate(self._bytes, 1):
            weight += group
            if weight >= size or stop == len(self._bytes):
                spans.append((start, stop))
                start, weight = stop, 0
        return spans

    def weigh(self, span: Span) -> int:
        return int(sum(self._bytes[slice(*span)]))

    def columns(self) -> list[str] | None:
        return self._columns

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        place = self._first[span[0]]
        try:
            with pyarrow.parquet.ParquetFile(self.path, memory_map=True) as file:
                for batch in file.iter_batches(256, row_groups=list(range(*span)), columns=columns or None):
                    for row in _batch_rows(batch):
                        yield place, row
                        place += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ModelLinkError(f"the file cannot be read on: {error}", where=self.name_place(place),
                                 fix="copy or download it anew") from None

    def name_place(self, place: int) -> str:
        return f"{self.path}, row {place}"


def _batch_rows(batch: pyarrow.RecordBatch) -> list[Row]:
    try:
        return cast(list[Row], batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow(f"not UTF-8: {error}")]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]


FORMATS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": lambda path: Lines(path, _json_line),
    ".jsonl.gz": lambda path: Lines(path, _json_line),
    ".txt": lambda path: Lines(path, _text_line),
    ".txt.gz": lambda path: Lines(path, _text_line),
    ".json": lambda path: JsonArray(path) if _is_array(path) else Lines(path, _json_line),
    ".csv": Csv,
    ".parquet": Parquet,
}


def _is_array(path: Path) -> bool:
    """Many `.json` files in the wild hold one object a line."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return not file.read(CHUNK).lstrip().startswith("{")
