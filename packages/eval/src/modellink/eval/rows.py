# SPDX-License-Identifier: Apache-2.0
"""Read the rows of a file strictly: a row that does not match the layout is an error with file and row; none is skipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink.eval.task import Kind, Layout
from modellink.kernels.errors import ModelLinkError

csv.field_size_limit(1 << 27)


@dataclass(frozen=True)
class Row:
    """One row: its number in the file, from 1 without the header, and its columns."""

    number: int
    values: Mapping[str, Any]


def read_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """Yield the validated rows of a file, without blank lines."""
    text = read_text(path, layout)
    number = 0
    try:
        for line, raw in _RAW[layout.reader](text):
            number += 1
            where = f"{path}, row {number}" + (f" (line {line})" if line not in (number, None) else "")
            yield Row(number, _columns(raw, layout, where))
    except (csv.Error, json.JSONDecodeError) as error:
        raise ModelLinkError(f"not {layout.reader}: {error}", where=f"{path}, row {number + 1}") from None
    except _Misfit as error:
        raise ModelLinkError(str(error), where=f"{path}, row {number + 1}") from None


def read_text(path: Path, layout: Layout) -> str:
    """Return the text of a file, decompressed if it ends in .gz."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ModelLinkError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        before = data[:error.start].rpartition(b"\n")[0].decode("utf-8-sig")
        raise ModelLinkError(f"not UTF-8 text: {error.reason} ({data[error.start]:#04x})",
                             where=f"{path}, row {_count(before, layout) + 1} (line {line})",
                             fix="write the file in UTF-8") from None


def _count(text: str, layout: Layout) -> int:
    """Return the number of complete rows in the beginning of a file."""
    count = 0
    try:
        for _ in _RAW[layout.reader](text) if layout.reader != "json" else ():
            count += 1
    except (csv.Error, json.JSONDecodeError, _Misfit):
        pass
    return count


class _Misfit(Exception):
    """The file does not have the format of its reader."""


def _csv(text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    for row in reader:
        if row:
            yield reader.line_num, row


def _csv_header(text: str) -> Iterator[tuple[None, dict[str, str]]]:
    rows = _csv(text)
    _, header = next(rows, (0, None))
    for _, row in rows:
        if len(row) != len(header or ()):
            raise _Misfit(f"{len(row)} columns, the header has {len(header or ())}: {', '.join(header or ())}")
        yield None, dict(zip(header or (), row, strict=True))


def _jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            yield line, json.loads(part)


def _json(text: str) -> Iterator[tuple[None, Any]]:
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("examples"), list):
        raise _Misfit("not an object with a list of examples")
    yield from ((None, row) for row in found["examples"])


_RAW: Mapping[str, Any] = {"csv": _csv, "csv-header": _csv_header, "jsonl": _jsonl, "json": _json}


def _columns(raw: Any, layout: Layout, where: str) -> dict[str, Any]:
    names = ", ".join(layout.columns)
    if layout.reader == "csv":
        if len(raw) != len(layout.columns):
            raise ModelLinkError(f"{len(raw)} columns, there must be {len(layout.columns)}: {names}", where=where)
        raw = dict(zip(layout.columns, raw, strict=True))
    elif not isinstance(raw, dict):
        raise ModelLinkError(f"not an object with {names}", where=where)
    return {name: _value(raw.get(name), kind, name, where) for name, kind in layout.columns.items()}


def _value(value: Any, kind: Kind, name: str, where: str) -> Any:
    if kind == "optional":
        if value is None or isinstance(value, str):
            return value or ""
        wanted = "a text"
    elif kind == "text":
        if isinstance(value, str) and value.strip():
            return value
        wanted = "a text that is not blank"
    elif kind == "bool":
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif kind == "texts":
        if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value or []
        wanted = "a list of texts"
    elif kind == "letters":
        letters = [] if value in (None, "") else value if isinstance(value, list) else [value]
        if all(isinstance(item, str) and len(item) == 1 and "A" <= item <= "Z" for item in letters):
            return letters
        wanted = "a capital letter or a list of them"
    else:
        if value in kind:
            return value
        wanted = "one of " + ", ".join(kind)
    shown = "missing" if value is None else repr(value)[:60]
    raise ModelLinkError(f"{name} is {shown}, it must be {wanted}", where=where)
