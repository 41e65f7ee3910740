# SPDX-License-Identifier: Apache-2.0
"""`metrics.jsonl`: one line per finished iteration, next to the checkpoints.

A line has the fields of `Step`. The results of an evaluation after the iteration are added to the line's `metrics` under
TensorBoard's names, e.g. "lm loss validation": every line is still one iteration with the same fields, as readers of the file
expect. A resumed run drops the lines of iterations that it repeats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from modellink.kernels.files import Journal, atomic_write

FILE = "metrics.jsonl"


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
    """The steps of a run, in memory and in the file.

    Args:
        folder: of the file. Default: the steps are only in memory.
        resumed: the iteration the run resumes from.
    """

    def __init__(self, folder: Path | None, resumed: int) -> None:
        self.steps: list[Step] = []
        self._path: Path | None = None
        if folder is None:
            return
        path = folder / FILE
        with Journal(path) as journal:
            self.steps = [_step(entry) for entry in journal.entries if entry["iteration"] <= resumed]
        lines = [_line(step) for step in self.steps]
        with atomic_write(path) as file:
            file.writelines(lines)
        self._path = path
        self._start, self._length = sum(map(len, lines[:-1])), sum(map(len, lines[-1:]))  # of the last line, in bytes

    def detach(self) -> None:
        """Keep further steps in memory only."""
        self._path = None

    def add(self, step: Step) -> None:
        self.steps.append(step)
        if self._path is not None:
            line = _line(step)
            with open(self._path, "ab") as file:
                self._start, self._length = file.tell(), len(line)
                _write(file, line)

    def add_evaluation(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add `values` to the last step, if it is the one of `iteration`."""
        if not self.steps or self.steps[-1].iteration != iteration:
            return
        self.steps[-1].metrics.update(values)
        if self._path is not None:
            # never shorter than before, so that nothing of the old line is left behind it
            line = _line(self.steps[-1])[:-1].ljust(self._length - 1) + b"\n"
            with open(self._path, "r+b") as file:
                file.seek(self._start)
                self._length = len(line)
                _write(file, line)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (iteration, value) of the loss ("loss") or of a further metric."""
        if name == "loss":
            return [(step.iteration, step.loss) for step in self.steps]
        return [(step.iteration, step.metrics[name]) for step in self.steps if name in step.metrics]


def _step(entry: Mapping[str, Any]) -> Step:
    """Return a step; fields of later versions are ignored."""
    known = {item.name for item in fields(Step)}
    return Step(**{name: value for name, value in entry.items() if name in known})


def _line(step: Step) -> bytes:
    return json.dumps(asdict(step)).encode() + b"\n"


def _write(file: Any, line: bytes) -> None:
    """Write a line with one call; it is on the disk when this returns."""
    file.write(line)
    file.flush()
    os.fsync(file.fileno())
