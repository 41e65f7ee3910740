# SPDX-License-Identifier: Apache-2.0
"""Readers of Parquet and Arrow files in batches of rows. Invalid UTF-8 makes only its own row bad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from modellink.data_prep.rows import BadRow, Row, Span
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    import pyarrow

# pyarrow is imported where a table is opened: workers on plain text start without it


class Parquet:
    """A parquet file; spans count row groups, positions are row numbers from 1."""

    has_header = True

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._columns = list(file.schema_arrow.names)
                groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise ModelLinkError(f"not a parquet file: {error}", where=path, fix="copy or download it again") from None
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
        import pyarrow.parquet

        place = self._first[span[0]]
        try:
            with pyarrow.parquet.ParquetFile(self.path, memory_map=True) as file:
                for batch in file.iter_batches(256, row_groups=list(range(*span)), columns=columns or None):
                    for row in _batch_rows(batch):
                        yield place, row
                        place += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ModelLinkError(f"the rest of the file cannot be read: {error}", where=f"{self.path}, row {place}",
                                 fix="copy or download it again") from None

    def name_places(self, places: Sequence[int]) -> list[str]:
        return [f"{self.path}, row {place}" for place in places]


def _batch_rows(batch: pyarrow.RecordBatch) -> list[Row]:
    try:
        return cast(list[Row], batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow(f"not UTF-8: {error}")]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]


class Arrow:
    """An Arrow file: the file format, whose spans count record batches, or a stream, which is one span.

    Positions are row numbers from 1. The files of Hugging Face's `datasets` are streams.
    """

    has_header = True

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        try:
            with self._open() as reader:
                self._columns = list(reader.schema.names)
                self._batches = reader.num_record_batches if isinstance(reader, pyarrow.ipc.RecordBatchFileReader) else 0
        except (pyarrow.ArrowException, OSError) as error:
            raise ModelLinkError(f"not an Arrow file: {error}", where=path, fix="copy or download it again") from None

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow

        with pyarrow.memory_map(str(self.path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file) as reader:
                yield reader

    def cut(self, size: int) -> list[Span]:
        if not self._batches:
            return [(0, 1)]
        count = max(1, min(self._batches, round(self.path.stat().st_size / size)))
        edges = [index * self._batches // count for index in range(count + 1)]
        return list(pairwise(edges))

    def weigh(self, span: Span) -> int:
        return self.path.stat().st_size * (span[1] - span[0]) // max(self._batches, 1)

    def columns(self) -> list[str] | None:
        return self._columns

    def rows(self, span: Span, columns: list[str]) -> Iterator[tuple[int, Row]]:
        import pyarrow

        place = 1
        wanted = [name for name in columns if name in self._columns]
        try:
            with self._open() as reader:
                if self._batches:
                    place += sum(reader.get_batch(index).num_rows for index in range(span[0]))
                batches = (reader.get_batch(index) for index in range(*span)) if self._batches else iter(reader)
                for whole in batches:
                    batch = whole.select(wanted) if columns else whole
                    for start in range(0, batch.num_rows, 256):
                        for row in _batch_rows(batch.slice(start, 256)):
                            yield place, row
                            place += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ModelLinkError(f"the rest of the file cannot be read: {error}", where=f"{self.path}, row {place}",
                                 fix="copy or download it again") from None

    def name_places(self, places: Sequence[int]) -> list[str]:
        return [f"{self.path}, row {place}" for place in places]
