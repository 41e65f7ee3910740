# SPDX-License-Identifier: Apache-2.0
"""Streaming readers of jsonl, json, txt and csv, also as .gz and .zst; `FORMATS` lists these and the tables (tables.py).

A source is split into spans that are read independently: byte ranges of a line file (a line belongs to the span of its first
byte) or parts of a table. Compressed, csv and json files are one span each, because the start of a row is only known after
reading everything before it. Memory holds at most one row, one parquet batch or a few MiB.

A row that cannot be read is yielded as a `BadRow`, and reading continues if possible. Each line of a txt file is a row
`{"text": line}`, as in the original. Not here: the meaning of columns and rows (handlers/).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import orjson

from modellink.data_prep.rows import BadRow, Row, Source, Span
from modellink.data_prep.tables import Arrow, Parquet
from modellink.kernels.errors import ModelLinkError

CHUNK = 1 << 20  # bytes
PEEK = 100  # rows read to find the columns
MARK = b"\xef\xbb\xbf"  # of byte order
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def unreadable() -> tuple[type[Exception], ...]:
    """Return the exceptions that libraries raise for a broken file; those of pyarrow only if it is imported."""
    arrow = sys.modules.get("pyarrow")
    return (EOFError, zlib.error, OSError, *([arrow.ArrowException] if arrow else []))


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressed if its content is compressed, whatever its name."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(GZIP):
        return cast(BinaryIO, gzip.open(path))
    if head == ZSTD:
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), CHUNK))
    return path.open("rb")


def open_text(path: Path, errors: str = "strict", newline: str | None = None) -> TextIO:
    """Open a file as UTF-8 text, with or without a byte-order mark."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors=errors, newline=newline)


def is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
    return head.startswith(GZIP) or head == ZSTD


class Lines:
    """A file of lines; positions and spans are in uncompressed bytes."""

    has_header = False

    def __init__(self, path: Path, parse: Callable[[bytes], Row | None]) -> None:
        self.path, self._parse = path, parse
        self._packed = is_packed(path)

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
            with open_bytes(self.path) as file:
                if start and not _seek_line(file, start, stop):
                    return
                position = file.tell() if start else 0
                while position < stop and (lines := file.readlines(min(CHUNK, stop - position))):
                    if position == 0 and lines[0].startswith(MARK):
                        lines[0], position = lines[0].removeprefix(MARK), len(MARK)
                    for line in lines:
                        if position >= stop:  # readlines may return one line more than requested
                            return
                        if (row := self._parse(line)) is not None:
                            yield position, row
                        position += len(line)
        except unreadable() as error:
            raise _broken(self.path, error) from None

    def name_places(self, places: Sequence[int]) -> list[str]:
        names, line, at = [], 1, 0
        with open_bytes(self.path) as file:
            for place in places:
                while at < place and (chunk := file.read(min(CHUNK, place - at))):
                    line += chunk.count(b"\n")
                    at += len(chunk)
                names.append(f"{self.path}, line {line}")
        return names


def _broken(path: Path, error: Exception) -> ModelLinkError:
    return ModelLinkError(f"the file cannot be read to its end: {error}", where=path, fix="copy or download it again")


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
    try:
        return _object(orjson.loads(line))
    except orjson.JSONDecodeError as error:
        return BadRow(f"not JSON: {error}") if line.strip() else None


def _text_line(line: bytes) -> Row | None:
    try:
        return {"text": line.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error}")


def _object(value: object) -> Row:
    return value if isinstance(value, dict) else BadRow(f"a {type(value).__name__} where a JSON object is expected")


def _columns(rows: Iterator[tuple[int, Row]]) -> list[str] | None:
    names: dict[str, None] = {}
    for count, (_, row) in enumerate(rows):
        if count == PEEK:
            break
        if not isinstance(row, BadRow):
            names |= dict.fromkeys(row)
    return list(names) or None


class _Whole:
    """A file that is one span; positions are row numbers from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, size: int) -> list[Span]:
        return [(0, 1)] if self.path.stat().st_size else []

    def weigh(self, span: Span) -> int:
        return self.path.stat().st_size

    def name_places(self, places: Sequence[int]) -> list[str]:
        return [f"{self.path}, row {place}" for place in places]


class JsonArray(_Whole):
    """A JSON array of objects, read object by object. A value that does not parse is an error only at the end of the file."""

    has_header = False

    def columns(self) -> list[str] | None:
        return _columns(self.rows((0, 1), []))

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            with open_text(self.path) as file:
                for number, value in enumerate(_elements(file), 1):
                    yield number, _object(value)
        except UnicodeDecodeError as error:
            raise ModelLinkError(f"not UTF-8: {error}", where=f"{self.path}, after row {number}",
                                 fix="write the file again as UTF-8") from None
        except unreadable() as error:
            raise _broken(self.path, error) from None
        except _NotJson as error:
            raise ModelLinkError(f"not a JSON array of objects: {error}", where=f"{self.path}, row {number + 1}",
                                 fix="fix the file or write it again") from None


class _NotJson(Exception):
    pass


def _elements(file: TextIO) -> Iterator[object]:
    """Yield the elements of the JSON array in `file`; holds one element and one chunk in memory."""
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
                if end < len(text):  # a number at the end of the chunk may continue in the next one
                    yield value
                    at, next_is = end, ", or ]"
                    continue
        elif head and head not in next_is:
            raise _NotJson(f"{head!r} where {next_is} belongs")
        elif head == "]":
            if (text[at + 1:] + file.read()).strip():
                raise _NotJson("data follows the end of the array")
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

    has_header = True

    def columns(self) -> list[str] | None:
        return next(self._records(), None)

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        records = self._records()
        names = next(records, [])
        for number, values in enumerate(records, 1):
            if not values:
                continue
            if len(values) != len(names):
                yield number, BadRow(f"{len(values)} fields, the header has {len(names)}")
            else:
                yield number, dict(zip(names, values, strict=True))

    def _records(self) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)
        try:
            # Invalid bytes become lone surrogates, so that only the rows that contain them are bad.
            with open_text(self.path, "surrogateescape", "") as file:
                lines = csv.reader(file, strict=True)
                try:
                    yield from lines
                except csv.Error as error:
                    raise ModelLinkError(f"not CSV: {error}", where=f"{self.path}, line {lines.line_num}",
                                         fix="fix the file or write it again") from None
        except unreadable() as error:
            raise _broken(self.path, error) from None


PACKED = (".gz", ".zst")  # may follow the extension of a text file
FORMATS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": lambda path: Lines(path, _json_line),
    ".txt": lambda path: Lines(path, _text_line),
    ".json": lambda path: JsonArray(path) if _is_array(path) else Lines(path, _json_line),
    ".csv": Csv,
    ".parquet": Parquet,
    ".arrow": Arrow,
}


def _is_array(path: Path) -> bool:
    """Return whether a .json file holds one object per line, as many do."""
    with open_text(path, "replace") as file:
        return not file.read(CHUNK).lstrip().startswith("{")
