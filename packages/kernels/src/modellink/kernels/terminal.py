# SPDX-License-Identifier: Apache-2.0
"""A line on a terminal that is redrawn in place, while processes that share the terminal print other lines above it.

Each process writes full lines with one call, and starts each with the code that erases a redrawn line; so no process has to
know whether another one has just drawn it. Not here: the bar of `Work` (progress.py), which no other process interrupts.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO, cast

ERASE = "\r\x1b[2K"
PERIOD = 0.1  # seconds between two drawings


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a line can be redrawn on the stream; sys.stdout may be None."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def width_of(stream: TextIO) -> int:
    """Return the present width of a terminal, in columns."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


class Line:
    """A line at the bottom of a terminal. It is cut to the terminal's width, since a wrapped line cannot be erased."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._last, self._text = stream, -PERIOD, ""

    @property
    def width(self) -> int:
        return width_of(self.stream) - 1  # a full line moves the cursor to the next one on some terminals

    def show(self, text: str, *, now: bool = False) -> None:
        """Replace the line; unless `now`, at most every `PERIOD` seconds."""
        self._text = text
        clock = time.monotonic()
        if now or clock - self._last >= PERIOD:
            self._last = clock
            self._write("")

    def leave(self) -> None:
        """Leave the last text on the screen, and end the line."""
        if self._text:
            self._write("\n")
            self._text = ""

    def _write(self, end: str) -> None:
        self.stream.write(ERASE + self._text[:self.width] + end)
        self.stream.flush()


class _FullLines:
    """Passes on full lines, each with one write that first erases a redrawn line; everything else is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._part, self._inside = stream, "", False

    def write(self, text: str) -> int:
        *lines, self._part = (self._part + text).split("\n")
        for line in lines:
            self._stream.write(f"{'' if self._inside else ERASE}{line}\n")
            self._inside = False
        if lines:
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Write what has no newline yet; the rest of that line follows it."""
        if self._part:
            self._stream.write(("" if self._inside else ERASE) + self._part)
            self._part, self._inside = "", True
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def above_a_line() -> Iterator[None]:
    """Within the context, what this process prints on a terminal goes above the line that any process redraws there.

    So does, after an exception, its message: sys.stdout and sys.stderr are not restored then.
    """
    stack = contextlib.ExitStack()
    if is_terminal(sys.stdout):
        stack.enter_context(contextlib.redirect_stdout(cast(TextIO, _FullLines(sys.stdout))))
    if is_terminal(sys.stderr):
        stack.enter_context(contextlib.redirect_stderr(cast(TextIO, _FullLines(sys.stderr))))
    yield
    stack.close()
