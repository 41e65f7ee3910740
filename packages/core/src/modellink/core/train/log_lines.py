# SPDX-License-Identifier: Apache-2.0
"""The lines of a training log: Megatron's for files and pipes, and shorter ones for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from modellink.core.train.history import Step

BAR = 16  # columns of a progress bar


def log_line(steps: Sequence[Step], train_iters: int, seconds: float, speed: Sequence[str] = ()) -> str:
    """Return the line about the iterations since the last one, as the original prints it.

    Args:
        seconds: all time since the last line.
        speed: parts about throughput.
    """
    last = steps[-1]
    good = [step.loss for step in steps if not step.skipped and math.isfinite(step.loss)]
    nan = sum(not math.isfinite(step.loss) for step in steps)
    parts = [f"iteration {last.iteration:8d}/{train_iters:8d}",
             f"consumed samples: {last.consumed_samples:12d}",
             f"elapsed time per iteration (ms): {seconds / len(steps) * 1000:.1f}", *speed,
             f"learning rate: {last.learning_rate:.6E}", f"global batch size: {last.global_batch_size:5d}"]
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
    return f" [{datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(parts) + " |"


def evaluation_lines(where: str, means: Mapping[str, float]) -> str:
    """Return the means of an evaluation in the original's frame; the first is the loss."""
    (_, loss), *others = means.items()
    line = f" validation loss at {where} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity(loss):.6E} | "
    line += "".join(f"{name}: {value:.6E} | " for name, value in others)
    return "\n".join(("-" * len(line), line, "-" * len(line)))


def short_evaluation(iteration: int, share: str, means: Mapping[str, float]) -> str:
    """Return the means of an evaluation as one short line; `share` is the part of the data, e.g. validation."""
    (_, loss), *others = means.items()
    parts = [f"{share} loss {loss:.4f}", f"perplexity {perplexity(loss):.2f}"]
    parts += [f"{name} {value:.4g}" for name, value in others]
    return f"iteration {iteration}: {', '.join(parts)}"


def progress_line(step: Step, train_iters: int, tokens: float | None, left: float | None, width: int) -> str:
    """Return the line that a terminal shows, at most `width` columns long.

    Args:
        tokens: tokens per second of all ranks; None shows samples per second.
        left: seconds until the last iteration; None if unknown.
    """
    speed = f"{step.global_batch_size / step.seconds:,.1f} samples/s" if tokens is None else f"{tokens:,.0f} tokens/s"
    parts = [f"iteration {step.iteration}/{train_iters}", f"loss {step.loss:.4f}", speed]
    if left is not None:
        parts.append(f"{timedelta(seconds=round(left))} left")
    text = "  ".join(parts)
    done = round(BAR * step.iteration / max(1, train_iters))
    bar = f"[{'#' * done}{'.' * (BAR - done)}]  "
    return (bar + text if len(bar) + len(text) <= width else text)[:width]


def perplexity(loss: float) -> float:
    return math.exp(min(20.0, loss))
