# SPDX-License-Identifier: Apache-2.0
"""Summarizes a trace in a few numbers.

    communication   fraction of the traced time with a transfer of this rank in progress, overlapped with computation or not
    bubble          with pipeline stages, fraction of the traced time without computation or collectives of this rank: waiting for
                    another stage, or transfers that do not overlap
    memory peak     largest allocation so far (on a CPU: resident set)

Computation means the ranges of forward, backward and optimizer on a CPU, and the device's kernels on CUDA. NPU traces
contain these sums in step_trace_time.csv, with the time of receiving as the bubble.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMUNICATION = re.compile(r"(gloo|nccl|hccl|c10d)(:|Dev|Kernel)", re.IGNORECASE)
BETWEEN_TWO = re.compile(r"send|recv|receive", re.IGNORECASE)
COMPUTING = ("forward-compute", "backward-compute", "optimizer-step")
"""Ranges in the trace; the training loop adds "optimizer-step"."""
TOP = 8
Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """The summary of one rank.

    Attributes:
        seconds: per iteration.
        communication, bubble: fractions from 0 to 1; None if unknown.
        memory: peak in bytes.
        ops: the slowest ops: name, seconds of self time in all traced iterations, calls.
    """

    rank: int
    iterations: int
    seconds: float
    communication: float | None
    bubble: float | None
    memory: int
    ops: list[tuple[str, float, int]]


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def of_events(events: Sequence[Any], *, rank: int, iterations: int, memory: int) -> Summary:
    """Summarize events of torch's profiler (name, `time_range` in microseconds, device, self time)."""
    spans = [(event, (event.time_range.start, event.time_range.end)) for event in events]
    steps = [span for event, span in spans if event.name.startswith("ProfilerStep#")]
    first, last = min(start for start, _ in steps or [s for _, s in spans]), max(end for _, end in steps or [s for _, s in spans])
    inside = [(event, (max(start, first), min(end, last))) for event, (start, end) in spans if start < last and end > first]
    kernels = [(event, span) for event, span in inside if event.device_type.name != "CPU" and not event.is_user_annotation]
    transfers = [(event, span) for event, span in kernels or inside if COMMUNICATION.match(event.name)]
    computing = ([span for event, span in kernels if not COMMUNICATION.match(event.name)] if kernels
                 else [span for event, span in inside if event.name in COMPUTING])
    collective = [span for event, span in transfers if not BETWEEN_TWO.search(event.name)]
    whole = last - first
    return Summary(rank, iterations, whole / iterations / 1e6, covered(span for _, span in transfers) / whole,
                   1 - covered(computing + collective) / whole, memory, _slowest(event for event, _ in kernels or inside))


def _slowest(events: Iterable[Any]) -> list[tuple[str, float, int]]:
    own: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.is_user_annotation or COMMUNICATION.match(event.name) or ".py(" in event.name:  # lines of Python are not ops
            continue
        seconds, calls = own.get(event.name, (0.0, 0))
        spent = event.self_device_time_total if event.device_type.name != "CPU" else event.self_cpu_time_total
        own[event.name] = seconds + spent / 1e6, calls + 1
    ranked = sorted(own.items(), key=lambda item: -item[1][0])
    return [(name, seconds, calls) for name, (seconds, calls) in ranked[:TOP]]


def of_npu(folder: Path, name: str, *, rank: int, iterations: int, memory: int) -> Summary | None:
    """Summarize the files of torch_npu's profiler; None if it wrote none."""
    made = sorted(folder.glob(f"{name}_*_ascend_pt/ASCEND_PROFILER_OUTPUT"))
    if not made or not (file := made[-1] / "step_trace_time.csv").is_file():
        return None
    sums: dict[str, float] = {}
    for row in _rows(file):
        for column in ("Computing", "Communication(Not Overlapped)", "Communication", "Free", "Bubble"):
            sums[column] = sums.get(column, 0.0) + float(row.get(column) or 0)
    whole = sums["Computing"] + sums["Communication(Not Overlapped)"] + sums["Free"]
    ops = [(row["OP Type"], float(row["Total Time(us)"]) / 1e6, int(row["Count"]))
           for row in _rows(made[-1] / "op_statistic.csv")]
    return Summary(rank, iterations, whole / iterations / 1e6, sums["Communication"] / whole, sums["Bubble"] / whole, memory,
                   sorted(ops, key=lambda op: -op[1])[:TOP])


def _rows(file: Path) -> list[Mapping[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def ideal_bubble(stages: int, chunks: int, micro_batches: int) -> float | None:
    """The bubble of a schedule with passes of equal duration (Narayanan et al. 2021, arXiv:2104.04473); None without stages."""
    return None if stages == 1 else (stages - 1) / (stages - 1 + micro_batches * chunks)


def text(where: str, summaries: Sequence[Summary], ideal: float | None) -> str:
    """The summary as a printable table."""
    lines = [f"profile of {where}",
             f"{'rank':>6}{'ms per iteration':>18}{'communication':>16}{'bubble':>10}{'memory peak (MB)':>19}"]
    for one in summaries:
        communication, bubble = (f"{share:.1%}" if share is not None else "-" for share in (
            one.communication, one.bubble if ideal is not None else None))
        lines.append(f"{one.rank:>6}{one.seconds * 1e3:>18.1f}{communication:>16}{bubble:>10}{one.memory / 2**20:>19.1f}")
    if ideal is not None:
        lines.append(f"ideal bubble of the schedule, with passes of equal duration: {ideal:.1%}")
    first = summaries[0]
    lines.append(f"slowest ops of rank {first.rank}, by self time:")
    lines += [f"{seconds * 1e3:>12.1f} ms {seconds / first.seconds / first.iterations:>7.1%} {calls:>8} calls  {name}"
              for name, seconds, calls in first.ops]
    return "\n".join(lines)
