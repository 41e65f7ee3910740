# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: the log line in the original's format, metrics.jsonl, TensorBoard, Weights & Biases and the loss curve.

The last rank prints, as in the original. `metrics.jsonl` is next to the checkpoints; a resumed run drops its entries
of iterations that will be repeated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tensorboardX import SummaryWriter

from modellink.core.launch import rank
from modellink.core.train.curve import draw
from modellink.core.train.tracker import Tracker
from modellink.kernels.device import Device
from modellink.kernels.files import Journal, atomic_write


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
    """Further metrics of the training method, by name."""


class Metrics:
    """Collects steps and reports them on the last rank.

    Args:
        active: this is the last rank.
        reports_memory: this rank prints a line about its memory after the first log line.
        resumed: the iteration the run resumes from.
        throughput: returns the parts of the log line about speed. Default: none.
        tracker: opens an external tracker. Default: none.
    """

    def __init__(self, *, active: bool, reports_memory: bool, device: Device, train_iters: int, log_interval: int,
                 folder: Path | None, tensorboard_dir: Path | None, resumed: int,
                 throughput: Callable[[Sequence[Step]], list[str]] | None = None,
                 tracker: Callable[[], Tracker] | None = None) -> None:
        self.active, self.reports_memory, self.device = active, reports_memory, device
        self.train_iters, self.log_interval = train_iters, log_interval
        self.throughput = throughput
        self.folder, self.tensorboard_dir, self.resumed = folder, tensorboard_dir, resumed
        self._opened = False
        self.history: list[Step] = []
        self._window: list[Step] = []
        self._journal: Journal | None = None
        self._events: SummaryWriter | None = None
        self._open_tracker = tracker
        self._tracker: Tracker | None = None

    def _open(self) -> None:
        """Create the files at the first step, so that a run that fails earlier leaves none."""
        if self.folder is not None:
            self._open_journal(self.folder, self.resumed)
        if self.tensorboard_dir is not None:
            self._events = SummaryWriter(str(self.tensorboard_dir), purge_step=self.resumed + 1 if self.resumed else None)
        if self._open_tracker is not None:
            self._tracker = self._open_tracker()

    def _open_journal(self, folder: Path, resumed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        with Journal(path) as journal:
            kept = [entry for entry in journal.entries if entry["iteration"] <= resumed]
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        self.history = [Step(**entry) for entry in kept]
        self._journal = Journal(path)

    def add(self, step: Step) -> None:
        due = step.iteration % self.log_interval == 0 or step.iteration == self.train_iters
        if self.active:
            self._note(step, due=due)
        if due and self.reports_memory:
            self._report_memory(step.iteration)

    def _note(self, step: Step, *, due: bool) -> None:
        if not self._opened:
            self._opened = True
            self._open()
        self.history.append(step)
        self._window.append(step)
        if self._journal:
            self._journal.append(step.__dict__)
        self._draw({"lm loss": step.loss, "learning-rate": step.learning_rate, "grad-norm": step.grad_norm,
                    "loss-scale": step.loss_scale, "iteration-time": step.seconds, "batch-size": step.global_batch_size,
                    "num-zeros": step.num_zeros, **step.balance, **step.metrics}, step.iteration)
        if due:
            self._print()

    def _draw(self, values: Mapping[str, float | None], iteration: int) -> None:
        """Send the values to TensorBoard and the tracker."""
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if self._events:
            for name, value in known.items():
                self._events.add_scalar(name, value, iteration)
        if self._tracker:
            self._tracker.log(known, iteration)

    def _print(self) -> None:
        steps, self._window = self._window, []
        last, seconds = steps[-1], sum(step.seconds for step in steps) / len(steps)
        good = [step.loss for step in steps if not step.skipped and math.isfinite(step.loss)]
        nan = sum(not math.isfinite(step.loss) for step in steps)
        parts = [f"iteration {last.iteration:8d}/{self.train_iters:8d}",
                 f"consumed samples: {last.consumed_samples:12d}",
                 f"elapsed time per iteration (ms): {seconds * 1000:.1f}"]
        if self.throughput is not None:
            parts += self.throughput(steps)
        parts += [f"learning rate: {last.learning_rate:.6E}", f"global batch size: {last.global_batch_size:5d}"]
        if good:
            parts.append(f"lm loss: {sum(good) / len(good):.6E}")
        parts += [f"{name}: {sum(step.balance[name] for step in steps) / len(steps):.6E}" for name in last.balance]
        parts += [f"{name}: {sum(step.metrics[name] for step in steps) / len(steps):.6E}" for name in last.metrics]
        parts.append(f"loss scale: {last.loss_scale:.1f}")
        if last.grad_norm is not None:
            parts.append(f"grad norm: {last.grad_norm:.3f}")
        if last.num_zeros is not None:
            parts.append(f"num zeros: {last.num_zeros:.1f}")
        parts += [f"number of skipped iterations: {sum(step.skipped for step in steps):3d}",
                  f"number of nan iterations: {nan:3d}"]
        print(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(parts) + " |", flush=True)

    def _report_memory(self, iterations: int) -> None:
        """Print the memory report once, in the original's format."""
        self.reports_memory = False
        megabytes = [f"{name}: {value / 2**20:.1f}" for name, value in self.device.memory_report().items()]
        print(f"[Rank {rank()}] (after {iterations} iterations) memory (MB) | {' | '.join(megabytes)}", flush=True)

    def evaluation(self, where: str, means: Mapping[str, float], iteration: int) -> None:
        """Print the means of an evaluation in the original's frame; the first is the loss."""
        if not self.active:
            return
        (_, loss), *others = means.items()
        line = (f" validation loss at {where} | lm loss value: {loss:.6E} | "
                f"lm loss PPL: {math.exp(min(20.0, loss)):.6E} | ")
        line += "".join(f"{name}: {value:.6E} | " for name, value in others)
        print("-" * len(line), line, "-" * len(line), sep="\n", flush=True)
        share = "test" if where.endswith("test set") else "validation"
        self._draw({f"lm loss {share}": loss} | {f"{name} {share}": value for name, value in others}, iteration)

    def close(self, curve: Path | None) -> None:
        """Close all files, and draw the loss curve if `curve` is a path."""
        if self._events:
            self._events.close()
        if self._tracker:
            self._tracker.close()
        if self._journal:
            self._journal.close()
        points = [(step.iteration, step.loss) for step in self.history if math.isfinite(step.loss)]
        if self.active and curve is not None and len(points) > 1:
            curve.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(curve, "w") as file:
                file.write(draw(points, title="lm loss", x="iteration"))


class Clock:
    """Measures wall-clock seconds of iterations, after the device has finished them."""

    def __init__(self, device: Device) -> None:
        self.device, self._last = device, time.perf_counter()

    def lap(self) -> float:
        self.device.synchronize()
        now = time.perf_counter()
        self._last, elapsed = now, now - self._last
        return elapsed
