# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: the log, metrics.jsonl, TensorBoard, Weights & Biases and the loss curve.

The last rank reports, as in the original. A file that cannot be written is dropped with a note, and training continues.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from modellink.core.launch import rank
from modellink.core.run import Run
from modellink.core.train import announce, history, screen
from modellink.core.train.curve import draw_losses
from modellink.core.train.events import Events, step_values
from modellink.core.train.history import History, Step
from modellink.core.train.log_lines import log_line, perplexity
from modellink.core.train.screen import Screen
from modellink.core.train.throughput import throughput
from modellink.core.train.tracker import Tracker
from modellink.kernels.device import Device
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import atomic_write
from modellink.kernels.messages import note

TRACKER = "Weights & Biases"


class Metrics:
    """Collects steps and evaluations, and reports them.

    Args:
        resumed: the iteration the run resumes from.
        active: this rank reports.
        reports_memory: this rank prints a line about its memory after the first log line.
    """

    def __init__(self, run: Run, resumed: int, *, active: bool, reports_memory: bool) -> None:
        self.run, self.resumed, self.active, self.reports_memory = run, resumed, active, reports_memory
        self.folder, self.train_iters = run.checkpoint.save, run.optimizer.train_iters
        self.picture = run.logging.curve or (self.folder and self.folder / "loss.svg")
        fixed = not run.instruction.variable_seq_lengths
        if run.logging.log_throughput and not fixed:
            note("throughput is not shown because samples differ in length")
        self.throughput = throughput(run) if fixed and active else None
        self.screen = Screen(self.train_iters, run.data.seq_length if fixed else None, progress=run.logging.progress)
        self.history = History(None, resumed)
        self._window: list[Step] = []
        self._is_open = False
        self._logged = time.perf_counter()
        self._events: Events | None = None
        self._tracker: Tracker | None = None

    def _open(self) -> None:
        """Create the files at the first step or evaluation, so that a run that fails earlier leaves none."""
        if self._is_open:
            return
        self._is_open = True
        if self.folder is not None:
            with self._or_drop(announce.FILE):
                self.folder.mkdir(parents=True, exist_ok=True)
                announce.write_arguments(self.folder, self.run, self.resumed)
            with self._or_drop(history.FILE, (OSError, ModelLinkError, LookupError, TypeError)):  # also another program's file
                self.history = History(self.folder, self.resumed)
            self.screen.log_file = self.folder / screen.FILE
        if (folder := self.run.logging.tensorboard_dir) is not None:
            with self._or_drop(str(folder)):
                self._events = Events(folder, self.resumed)
        if self.run.logging.wandb_project is not None:
            with self._or_drop(TRACKER, Exception):
                self._tracker = Tracker(self.run.logging, self.folder, self.run.settings)

    @contextlib.contextmanager
    def _or_drop(self, what: str, kinds: type[Exception] | tuple[type[Exception], ...] = OSError, *,
                 drop: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Note an error of the file system (or of other `kinds`), and call `drop` so that it does not occur again."""
        try:
            yield
        except kinds as error:
            drop()
            note(f"{what} cannot be written, and training continues without it: {error}", every_rank=True)

    def add(self, step: Step) -> None:
        due = step.iteration % self.run.logging.log_interval == 0 or step.iteration == self.train_iters
        if self.active:
            self._report(step, due=due)
        if due and self.reports_memory:
            self._report_memory(step.iteration)

    def _report(self, step: Step, *, due: bool) -> None:
        self._open()
        with self._or_drop(history.FILE):
            self.history.add(step)
        if self._events or self._tracker:
            speed = {} if self.throughput is None else self.throughput.rates([step])
            self._send(step_values(step, self.run.device) | speed, step.iteration)
        self._window.append(step)
        if due:
            now = time.perf_counter()
            seconds, self._logged = now - self._logged, now  # with evaluations, saves and whatever else took time
            shown = self.throughput if self.run.logging.log_throughput else None
            parts = [] if shown is None else shown.report(self._window, seconds)
            self._log(log_line(self._window, self.train_iters, seconds, parts))
            self._window = []
        self.screen.step(step)

    def _log(self, text: str) -> None:
        with self._or_drop(screen.FILE, drop=partial(setattr, self.screen, "log_file", None)):
            self.screen.log(text)

    def _send(self, values: Mapping[str, float | None], iteration: int) -> None:
        """Send the values to TensorBoard and the tracker."""
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if self._events:
            with self._or_drop("TensorBoard's file", drop=partial(setattr, self, "_events", None)):
                self._events.add(known, iteration)
        if self._tracker:
            with self._or_drop(TRACKER, Exception, drop=partial(setattr, self, "_tracker", None)):
                self._tracker.log(known, iteration)

    def _report_memory(self, iterations: int) -> None:
        """Report the memory of this rank once, in the original's format. A terminal shows only rank 0's."""
        self.reports_memory = False
        megabytes = [f"{name}: {value / 2**20:.1f}" for name, value in self.run.device.memory_report().items()]
        line = f"[Rank {rank()}] (after {iterations} iterations) memory (MB) | {' | '.join(megabytes)}"
        if self.active:
            self._log(line)
        elif not self.screen.shows_progress:
            print(line, flush=True)
        if self.screen.shows_progress and rank() == 0:
            print(line, flush=True)

    def evaluating(self, where: str, done: int) -> None:
        """Show that `done` iterations of an evaluation are done."""
        if self.active:
            self.screen.evaluating(where, done, self.run.logging.eval_iters)

    def evaluation(self, where: str, means: Mapping[str, float], iteration: int) -> None:
        """Report the means of an evaluation; the first is the loss."""
        if not self.active:
            return
        self._open()
        share = "test" if where.endswith("test set") else "validation"
        with self._or_drop(screen.FILE, drop=partial(setattr, self.screen, "log_file", None)):
            self.screen.evaluation(where, iteration, share, means)
        (_, loss), *others = means.items()
        losses = {f"lm loss {share}": loss, **{f"{name} {share}": value for name, value in others}}
        with self._or_drop(history.FILE):
            self.history.add_evaluation(iteration, losses)
        self._send(losses | {f"lm loss {share} ppl": perplexity(loss)}, iteration)

    def draw(self) -> None:
        """Draw the loss curve; after each save and at the end."""
        if not self.active:
            return
        with self._or_drop(history.FILE):
            self.history.sync()
        if self.picture is None:
            return
        svg = draw_losses({"training": self.history.curve("loss"), "validation": self.history.curve("lm loss validation")})
        if svg is not None:
            with self._or_drop(str(self.picture), drop=partial(setattr, self, "picture", None)):
                self.picture.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.picture, "w") as file:
                    file.write(svg)
        self.screen.redraw()

    def close(self) -> None:
        """Draw the loss curve and close all files."""
        self.draw()
        with self._or_drop(history.FILE):
            self.history.wait()
        self.screen.close()
        if self._events:
            with self._or_drop("TensorBoard's file"):
                self._events.close()
        if self._tracker:
            with self._or_drop(TRACKER, Exception):
                self._tracker.close()


class Clock:
    """Measures wall-clock seconds of iterations, after the device has finished them."""

    def __init__(self, device: Device) -> None:
        self.device, self._last = device, time.perf_counter()

    def lap(self) -> float:
        self.device.synchronize()
        now = time.perf_counter()
        self._last, elapsed = now, now - self._last
        return elapsed
