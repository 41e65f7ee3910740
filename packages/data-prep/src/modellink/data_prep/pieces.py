# SPDX-License-Identifier: Apache-2.0
"""Tokenize one piece of the input: read its rows, tokenize them and write them as a dataset, the part of that piece.

A part is a function of the piece and the job only: its bytes do not depend on the process or the time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from modellink.data_prep.engines import Choice
from modellink.data_prep.engines.gigatoken import Fast, GigaToken
from modellink.data_prep.handlers import Handler, Reading, make_handler, make_plain_handler
from modellink.data_prep.indexed import IndexedWriter, checksum, files_of
from modellink.data_prep.inputs import Piece, open_source
from modellink.data_prep.rows import BadRow
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import OUR_FAULT, ModelLinkError
from modellink.kernels.files import kill_point

BATCH_BYTES, BATCH_ROWS = 1 << 20, 1000  # of text per tokenizer call
NAMED = 5  # bad rows recorded per piece


class WorkerDied(ModelLinkError):
    """A worker process was killed; finished pieces are kept."""

    exit_status = OUR_FAULT


@dataclass(frozen=True)
class Around:
    """The ids before and after a text when only `gigatoken` tokenizes; see `Fast`."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    eod_token_id: int | None


@dataclass(frozen=True)
class Job:
    """The settings shared by all pieces. With `around`, a worker needs only `Fast` of the tokenizer."""

    tokenizer: Path
    backend: Choice
    verify: bool
    reading: Reading
    dtype: str
    skip_bad_rows: bool
    vocab_size: int | None
    parts: Path
    around: Around | None = None


@dataclass
class Done:
    """The result of a piece, as recorded in the journal.

    `verified`: the ids were compared with those of another library. `tokens` and `documents` are counts by output; `cut` and
    `dropped` count samples longer than allowed, `empty` those with an empty question or answer, `learned` tokens with a label.
    `checksums` are those of the files of the part; `bad` holds file, position and fault of the first bad rows.
    """

    piece: int
    verified: bool = False
    rows: int = 0
    skipped: int = 0
    cut: int = 0
    dropped: int = 0
    empty: int = 0
    learned: int = 0
    text_bytes: int = 0
    documents: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, int, str]] = field(default_factory=list)


def part_prefix(parts: Path, piece: int, output: str) -> Path:
    return parts / f"{piece:06d}_{output}"


def tokenize_piece(job: Job, piece: Piece, handler: Handler | None = None) -> Done:
    """Write the part of a piece and return its counts.

    Raises:
        ModelLinkError: a row cannot be used and is not to be skipped, or an id is beyond the vocabulary.
    """
    handler, done = handler or _handler(job), Done(piece.index, job.verify)
    with ExitStack() as stack:
        writers = {output: stack.enter_context(IndexedWriter(
            part_prefix(job.parts, piece.index, output), np.dtype(job.dtype), durable=False)) for output in handler.outputs}
        for batch in _batches(job, piece, handler, done):
            encoded = handler.encode([sample for _, sample in batch])
            done.cut += encoded.cut
            done.dropped += encoded.dropped
            done.empty += encoded.empty
            done.learned += encoded.learned
            for output, (ids, lengths) in encoded.fields.items():
                if job.vocab_size is not None and len(ids) and ids.max() >= job.vocab_size:
                    first = int((ids >= job.vocab_size).argmax())
                    sample = int(np.searchsorted(np.cumsum(lengths), first, "right"))
                    raise _beyond(job, int(ids[first]), _place(batch[sample][0]))
                writers[output].add_documents(ids, lengths)
    for output, writer in writers.items():
        done.documents[output], done.tokens[output] = writer.documents, writer.tokens
        done.checksums |= {path.name: checksum(path) or 0 for path in files_of(writer.prefix)}
    kill_point("piece-written")
    return done


@lru_cache(maxsize=1)
def _handler(job: Job) -> Handler:
    if job.around is not None:
        source = (job.tokenizer / "tokenizer.json").read_text(encoding="utf-8")
        around = job.around
        return make_plain_handler(Fast(job.tokenizer, source, around.head, around.tail, around.eod_token_id), job.reading)
    tokenizer = Tokenizer.from_folder(job.tokenizer, job.backend)
    if isinstance(tokenizer.engine, GigaToken):
        tokenizer.engine.verify = job.verify
    return make_handler(tokenizer, job.reading)


Place = tuple[Path, int]


def _place(place: Place) -> str:
    return open_source(place[0]).name_places([place[1]])[0]


def _batches(job: Job, piece: Piece, handler: Handler, done: Done) -> Iterator[list[tuple[Place, Any]]]:
    batch: list[tuple[Place, Any]] = []
    weight = 0
    for path, span in piece.spans:
        reader = handler.rows_of(path)
        columns = [*reader.columns, *reader.optional]
        for at, row in open_source(path).rows(span, columns):
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.why)
                sample = reader.parse(row)
            except ValueError as error:
                if not job.skip_bad_rows:
                    raise ModelLinkError(f"a row cannot be used: {error}", where=_place((path, at)),
                                         fix="fix it, or skip such rows with --on-bad-row skip") from None
                done.skipped += 1
                if len(done.bad) < NAMED:
                    done.bad.append((str(path), at, str(error)))
                continue
            batch.append(((path, at), sample))
            size = sum(_text_bytes(row.get(column)) for column in columns)
            done.rows += 1
            done.text_bytes += size
            weight += size
            if weight >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
                yield batch
                batch, weight = [], 0
    if batch:
        yield batch


def _text_bytes(value: object) -> int:
    """Return the UTF-8 bytes of the texts in a value."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


def _beyond(job: Job, token: int, where: str) -> ModelLinkError:
    return ModelLinkError(f"token id {token} is beyond the vocabulary of {job.vocab_size:,}", where=where,
                          fix="use the tokenizer of the model, or correct --vocab-size")


class Workers:
    """Pool of tokenizing processes, a context manager. They start while the parent is still checking inputs and options."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def start(self, count: int) -> None:
        """Start `count` processes; with 1, this process does the work."""
        if count > 1 and self.pool is None:
            # spawn, not fork: a forked copy of a process with threads, which tokenizers starts, may hang.
            self.pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker)
            for _ in range(count):
                self.pool.submit(_warm_up)


def tokenize(job: Job, pieces: list[Piece], workers: int, handler: Handler | None = None,
             started: Workers | None = None) -> Iterator[Done]:
    """Tokenize pieces in this process (with `handler`) or in `workers` processes; yield results as they finish.

    When pieces fail, the running ones are finished first and the error of the earliest one is raised, so that the same input
    gives the same message for any number of workers.
    """
    if workers <= 1:
        yield from (tokenize_piece(job, piece, handler) for piece in pieces)
        return
    todo = iter(pieces)
    waiting: dict[Future[Done], int] = {}
    failed: dict[int, Exception] = {}
    with started or Workers() as processes:
        processes.start(workers)
        assert processes.pool is not None
        while True:
            for piece in islice(todo, 0 if failed else 2 * workers - len(waiting)):
                try:
                    waiting[processes.pool.submit(tokenize_piece, job, piece)] = piece.index
                except BrokenProcessPool as broken:
                    failed[piece.index] = broken
                    break
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                index = waiting.pop(future)
                if error := future.exception():
                    failed[index] = error if isinstance(error, Exception) else RuntimeError(str(error))
                else:
                    yield future.result()
    if failed:
        index, error = min(failed.items())
        if isinstance(error, BrokenProcessPool):
            raise WorkerDied(f"a worker process died near piece {index}", where="--workers",
                             fix="this usually means out of memory: use fewer workers. Finished pieces are kept: run the "
                             "command again. (In your own script, call preprocess() under `if __name__ == '__main__':`.)")
        raise error


def _warm_up() -> None:
    """Import in advance what the first piece needs."""
    with suppress(ImportError):
        import_module("gigatoken")


def _start_worker() -> None:
    """Set up a worker: ignore Ctrl-C, which the parent handles; end with the parent; use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if (parent := parent_process()) is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
