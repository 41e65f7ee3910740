"""What reading a file gives: rows, each with its place, in spans that can be read apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class BadRow:
    """A row that is no data, and why."""

    why: str


Row = dict[str, Any] | BadRow
Span = tuple[int, int]  # start and stop, in what the format counts by


class Source(Protocol):
    """One input file.

    `cut` gives its spans of about `size` bytes, `weigh` the bytes of a span, `rows` the rows of a span each with its place
    (a byte or a row number), `name_places` ascending places in words, by one pass over the file at most, `columns` the names
    in its first rows, or None when unknown. With `has_header` these are all there are.
    """

    path: Path
    has_header: bool

    def cut(self, size: int) -> list[Span]: ...
    def weigh(self, span: Span) -> int: ...
    def columns(self) -> list[str] | None: ...
    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]: ...
    def name_places(self, places: Sequence[int]) -> list[str]: ...
