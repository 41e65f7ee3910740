# SPDX-License-Identifier: Apache-2.0
"""`metrics.jsonl`: one line per finished iteration, next to the checkpoints.

A line has the fields of `Step`. The results of an evaluation after the iteration are added to the line's `metrics` under
TensorBoard's names, e.g. "lm loss validation": every line is still one iteration with the same fields, as readers of the file
expect. A resumed run drops the lines of iterations that it repeats.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from modellink.core.train.curve import thin
from modellink.kernels.files import Journal, atomic_write

FILE = "metrics.jsonl"
POINTS = 4096  # of a curve that are kept in memory; twice as many before they are thinned


@dataclass(frozen=True)
class Step:
    """One finished iteration.

    Attributes:
        loss: the first metric of the training method; for pretrain and sft in nats per token.
        grad_norm: global gradient norm before clipping; None if it was not computed.
        seconds: wall-clock time.
    """

    iteration: int
    consumed_samples: int
    global_batch_size: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    loss_scale: float
    skipped: bool
    seconds: float
    num_zeros: int | None = None
    """Zeros in the gradient, with --log-num-zeros-in-grad."""
    balance: dict[str, float] = field(default_factory=dict)
    """Balance losses of the routers of experts, by name, without their coefficients."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further metrics of the training method by name, and those of an evaluation, e.g. "lm loss validation"."""


class History:
    """The steps of a run in a file, and their curves, thinned, in memory: a long run needs no more memory than a short one.

    When the file cannot be written, further steps go to a temporary file, so that the result of the run has them.

    Args:
        folder: of the file. Default: a temporary file.
        resumed: the iteration the run resumes from.
    """

    def __init__(self, folder: Path | None, resumed: int) -> None:
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._last: Step | None = None
        self._start = self._end = 0  # of the last line, in bytes
        self._syncing: Future[None] | None = None
        self._lasting = folder is not None
        if folder is None:
            self._file = _temporary()
            return
        path = folder / FILE
        with Journal(path) as journal:
            steps = [_step(entry) for entry in journal.entries if entry["iteration"] <= resumed]
        with atomic_write(path) as file:
            file.writelines(map(_line, steps))
        self._file = _Descriptor(os.open(path, os.O_RDWR))
        for step in steps:
            self._remember(step)
            self._start, self._end = self._end, self._end + len(_line(step))

    @property
    def steps(self) -> list[Step]:
        """All steps, read from the file."""
        with os.fdopen(os.dup(self._file.number), "rb") as file:
            file.seek(0)
            return [_step(json.loads(line)) for line in file.read(self._end).splitlines()]

    def add(self, step: Step) -> None:
        """Record a step.

        Raises:
            OSError: the file cannot be written; once, as a temporary file replaces it.
        """
        self._remember(step)
        self._start = self._end
        self._write(_line(step))

    def add_evaluation(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add `values` to the last step, if it is the one of `iteration`."""
        if self._last is None or self._last.iteration != iteration:
            return
        self._last.metrics.update(values)
        self._note(iteration, values)
        # never shorter than before, so that nothing of the old line is left behind it
        self._write(_line(self._last)[:-1].ljust(self._end - self._start - 1) + b"\n")

    def sync(self) -> None:
        """Start to write the file to the disk in the background; raises OSError if that has failed before."""
        if self._lasting:
            self.wait()
            self._syncing = _background().submit(os.fsync, self._file.number)

    def wait(self) -> None:
        """Wait until what `sync` started is done."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (iteration, value) of the loss ("loss") or of a further metric."""
        return list(self._curves.get(name, ()))

    def _remember(self, step: Step) -> None:
        self._last = step
        self._note(step.iteration, {"loss": step.loss} | step.metrics)

    def _note(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            points = self._curves.setdefault(name, [])
            if math.isfinite(value):
                points.append((iteration, value))
            if len(points) > 2 * POINTS:
                points[:] = thin(points, POINTS)

    def _write(self, line: bytes) -> None:
        """Write the last line with one call."""
        self._end = self._start + len(line)
        try:
            self._put(line, self._start)
        except OSError:
            if self._lasting:
                self._replace(line)
                raise
            self._end = self._start  # the next line overwrites what is there of this one

    def _put(self, data: bytes, at: int) -> None:
        while data:  # a short write is followed by its reason
            written = os.pwrite(self._file.number, data, at)
            data, at = data[written:], at + written

    def _replace(self, line: bytes) -> None:
        """Continue in a temporary file; if it cannot be written either, the result of the run lacks steps."""
        self._lasting, self._syncing = False, None
        try:
            before = os.pread(self._file.number, self._start, 0)
            self._file = _temporary()
            self._put(before + line, 0)
        except OSError:
            self._start = self._end = 0


class _Descriptor:
    """A file descriptor that is closed with the object."""

    def __init__(self, number: int) -> None:
        self.number = number
        weakref.finalize(self, os.close, number)


def _temporary() -> _Descriptor:
    with tempfile.TemporaryFile() as file:
        return _Descriptor(os.dup(file.fileno()))


@cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="history")


def _step(entry: Mapping[str, Any]) -> Step:
    """Return a step; fields of later versions are ignored."""
    known = {item.name for item in fields(Step)}
    return Step(**{name: value for name, value in entry.items() if name in known})


def _line(step: Step) -> bytes:
    return json.dumps(asdict(step)).encode() + b"\n"
