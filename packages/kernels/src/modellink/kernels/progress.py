# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with rate and remaining time on a terminal, a plain line every few seconds
elsewhere.

Both go to stderr, so that stdout has only results. Not here: the training log, whose lines have their own
format.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from modellink.kernels.terminal import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

MEGABYTE, GIGABYTE = 10 ** 6, 10 ** 9
PLAIN_SECONDS = 10.0  # between two lines without a terminal


class Work:
    """Work of known or unknown size, as a context manager.

    Args:
        what: a few words, e.g. `converting`.
        total: number of units; None if it is unknown.
        unit: plural name of a unit, e.g. `tensors`; `bytes` are shown as MB or GB.
        show: False prints nothing (on every rank but the first).
    """

    def __init__(self, what: str, total: int | None = None, *, unit: str = "items",
                 show: bool = True) -> None:
        self.what, self.total, self.unit, self.show = what, total, unit, show
        self.done, self._start, self._last = 0, time.monotonic(), time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Work:
        self._start = self._last = time.monotonic()
        if self.show and is_terminal(sys.stderr):
            # importing it takes 0.1 s, which worker processes and log files need not wait for
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
                                 console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self.what, total=self.total, count="")
        return self

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, count=self._count(now))
        elif self.show and now - self._last >= PLAIN_SECONDS:
            self._last = now
            print(f"{self.what}: {self._count(now)}", file=sys.stderr, flush=True)

    def _count(self, now: float) -> str:
        rate = self.done / max(now - self._start, 1e-9)
        if self.unit == "bytes":
            unit, name = (MEGABYTE, "MB") if (self.total or GIGABYTE) < GIGABYTE else (GIGABYTE, "GB")
            of = "" if self.total is None else f" of {self.total / unit:,.2f}"
            shown = f"{self.done / unit:,.2f}{of} {name}, {rate / unit:,.2f} {name}/s"
        else:
            of = "" if self.total is None else f" of {self.total:,}"
            shown = f"{self.done:,}{of} {self.unit}, {rate:,.1f} a second"
        left = (self.total or 0) - self.done
        return f"{shown}, {timedelta(seconds=round(left / rate))} left" if left > 0 and rate else shown

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        now = time.monotonic()
        if self._bar is not None:
            took = timedelta(seconds=round(now - self._start))
            self._bar.update(self._bar.task_ids[0], count=f"{self._count(now)}, {took}")
            self._bar.stop()
        elif self.show and kind is None:
            print(f"{self.what}: {self._count(now)}, {now - self._start:.1f} s", file=sys.stderr, flush=True)
