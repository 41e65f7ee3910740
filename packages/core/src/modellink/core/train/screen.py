# SPDX-License-Identifier: Apache-2.0
"""Where the log of a run goes: to `SAVE/train.log`, and to stdout. A terminal shows one progress line instead of log lines.

Other lines, also of other ranks, go above the progress line (modellink.kernels.terminal).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from modellink.core.train.history import Step
from modellink.core.train.log_lines import evaluation_lines, progress_line, short_evaluation
from modellink.kernels.terminal import Line, is_terminal

FILE = "train.log"
RECENT = 10  # iterations whose mean speed is shown


class Screen:
    """The log of one run, on the rank that reports.

    Args:
        train_iters: the last iteration.
        sequence: tokens of a sample; None if samples differ in length.
        progress: show a progress line if stdout is a terminal.
    """

    def __init__(self, train_iters: int, sequence: int | None, *, progress: bool) -> None:
        self.train_iters, self._sequence = train_iters, sequence
        self._line = Line(sys.stdout) if progress and is_terminal(sys.stdout) else None
        self._recent: deque[Step] = deque(maxlen=RECENT)
        self._first: tuple[int, float] | None = None
        self._progress = ""
        self.log_file: Path | None = None

    @property
    def shows_progress(self) -> bool:
        return self._line is not None

    def log(self, text: str) -> None:
        """Write to train.log, and print unless there is a progress line."""
        if self._line is None:
            print(text, flush=True)
        if self.log_file is not None:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def step(self, step: Step) -> None:
        """Redraw the progress line after an iteration."""
        if self._line is None:
            return
        self._recent.append(step)
        now, left = time.monotonic(), None
        if self._first is None:
            self._first = (step.iteration, now)  # the first iteration is slower than the others
        else:
            iteration, since = self._first  # the time includes evaluations and saves
            left = (now - since) / (step.iteration - iteration) * (self.train_iters - step.iteration)
        self._progress = progress_line(step, self.train_iters, self._tokens_per_second(), left, self._line.width)
        self._line.show(self._progress)

    def _tokens_per_second(self) -> float | None:
        if self._sequence is None:
            return None
        samples = sum(step.global_batch_size for step in self._recent)
        return samples * self._sequence / sum(step.seconds for step in self._recent)

    def evaluating(self, where: str, done: int, total: int) -> None:
        """Show on the progress line how far an evaluation is."""
        if self._line is not None:
            self._line.show(f"evaluating at {where}  {done}/{total}")

    def evaluation(self, where: str, iteration: int, share: str, means: Mapping[str, float]) -> None:
        """Show the result of an evaluation: `share` of the data, `where` as in the log."""
        if self._line is not None:
            print(short_evaluation(iteration, share, means), flush=True)
            self.redraw()
        self.log(evaluation_lines(where, means))

    def redraw(self) -> None:
        """Draw the progress line again, below the lines that were printed meanwhile."""
        if self._line is not None and self._progress:
            self._line.show(self._progress, now=True)

    def close(self) -> None:
        """Leave the last state of the progress line on the terminal."""
        if self._line is not None:
            self.redraw()
            self._line.leave()
            self._progress = ""
