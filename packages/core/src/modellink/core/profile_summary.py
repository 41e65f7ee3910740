"""What a trace says in a few numbers.

    communication   time in which a transfer of this rank was under way / traced time, whether or not computing hides it
    bubble          time in which this rank neither computed nor took part in a collective of several ranks / traced time, where
                    there are pipeline stages: it waited for another stage, or passed on what no computing hides
    memory peak     most that was allocated so far (on a CPU: resident)

Computing is, on a CPU, the ranges of the trace in which forward, backward or the optimizer go on; on CUDA the device's kernels.
An NPU's own files (step_trace_time.csv) hold these sums, with the time of receiving as the bubble.
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
"""Ranges; "optimizer-step" is the loop's own."""
TOP = 8
Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """Of one rank. `seconds` of an iteration; shares from 0 to 1, None where nothing says; `memory` in bytes; `ops` are the
    slowest: name, seconds of their own in all traced iterations, calls."""

    rank: int
    iterations: int
    seconds: float
    communication: float | None
    bubble: float | None
    memory: int
    ops: list[tuple[str, float, int]]


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def of_events(events: Sequence[Any], *, rank: int, iterations: int, memory: int) -> Summary:
    """From torch's profiler: events with a name, a `time_range` in microseconds, a device and their own time."""
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
        if event.is_user_annotation or COMMUNICATION.match(event.name) or ".py(" in event.name:  # lines of Python are no ops
            continue
        seconds, calls = own.get(event.name, (0.0, 0))
        spent = event.self_device_time_total if event.device_type.name != "CPU" else event.self_cpu_time_total
        own[event.name] = seconds + spent / 1e6, calls + 1
    ranked = sorted(own.items(), key=lambda item: -item[1][0])
    return [(name, seconds, calls) for name, (seconds, calls) in ranked[:TOP]]


def of_npu(folder: Path, name: str, *, rank: int, iterations: int, memory: int) -> Summary | None:
    """From the files that torch_npu's profiler makes; None where it made none."""
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
    """Of a schedule whose passes all take as long (Narayanan et al. 2021): None without stages."""
    return None if stages == 1 else (stages - 1) / (stages - 1 + micro_batches * chunks)


def text(where: str, summaries: Sequence[Summary], ideal: float | None) -> str:
    """The table that is printed."""
    lines = [f"profile of {where}",
             f"{'rank':>6}{'ms an iteration':>18}{'communication':>16}{'bubble':>10}{'memory peak (MB)':>19}"]
    for one in summaries:
        communication, bubble = (f"{share:.1%}" if share is not None else "-" for share in (
            one.communication, one.bubble if ideal is not None else None))
        lines.append(f"{one.rank:>6}{one.seconds * 1e3:>18.1f}{communication:>16}{bubble:>10}{one.memory / 2**20:>19.1f}")
    if ideal is not None:
        lines.append(f"a schedule whose passes all take as long has a bubble of {ideal:.1%}")
    first = summaries[0]
    lines.append(f"slowest ops of rank {first.rank}, by time of their own:")
    lines += [f"{seconds * 1e3:>12.1f} ms {seconds / first.seconds / first.iterations:>7.1%} {calls:>8} calls  {name}"
              for name, seconds, calls in first.ops]
    return "\n".join(lines)
