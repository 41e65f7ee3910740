# SPDX-License-Identifier: Apache-2.0
"""The interface of readers: rows with their positions, in spans that are read independently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and the reason."""

    why: str


Row = dict[str, Any] | BadRow
Span = tuple[int, int]  # start and stop, in the unit of the format


class Source(Protocol):
    """One input file.

    `cut` returns spans of about `size` bytes, `weigh` the bytes of a span, `rows` the rows of a span with their positions (byte
    or row number). `name_places` describes ascending positions in at most one pass over the file. `columns` returns the column
    names of the first rows, or None if unknown; with `has_header` the list is complete.
    """

    path: Path
    has_header: bool

    def cut(self, size: int) -> list[Span]: ...
    def weigh(self, span: Span) -> int: ...
    def columns(self) -> list[str] | None: ...
    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]: ...
    def name_places(self, places: Sequence[int]) -> list[str]: ...
