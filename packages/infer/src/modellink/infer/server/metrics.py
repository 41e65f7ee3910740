# SPDX-License-Identifier: Apache-2.0
"""Counters and histograms of the server, in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
COUNTERS = {
    "answers": "Completions that finished.", "failed": "Completions that failed.",
    "cancelled": "Completions whose client disconnected.",
    "prompt_tokens": "Prompt tokens of finished completions.", "generated_tokens": "Generated tokens.",
    "refused": "Requests refused because too many were running or waiting."}
TIMES = {"time_to_first_token_seconds": "Time from a request to its first token.",
         "answer_seconds": "Time from a request to the end of its completion."}


class Metrics:
    """Thread-safe counts; metric names start with `modellink_`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._times = {name: [0] * (len(BOUNDS) + 1) for name in TIMES}
        self._sums = dict.fromkeys(TIMES, 0.0)

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def request(self, path: str, status: int) -> None:
        with self._lock:
            self._requests[path, status] += 1

    def token(self, *, first: bool, waited: float) -> None:
        with self._lock:
            self._counts["generated_tokens"] += 1
            if first:
                self._observe("time_to_first_token_seconds", waited)

    def finished(self, prompt_tokens: int, seconds: float, *, failed: bool) -> None:
        with self._lock:
            self._counts["failed" if failed else "answers"] += 1
            self._counts["prompt_tokens"] += prompt_tokens
            self._observe("answer_seconds", seconds)

    def _observe(self, name: str, seconds: float) -> None:
        self._times[name][bisect_left(BOUNDS, seconds)] += 1
        self._sums[name] += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics as text. `gauges` maps further names to (help text, current value)."""
        lines = []
        with self._lock:
            for name, meaning in COUNTERS.items():
                lines += [*_head(f"{name}_total", meaning, "counter"),
                          f"modellink_{name}_total {self._counts[name]}"]
            lines += _head("http_requests_total", "Requests by path and status.", "counter")
            lines += [f'modellink_http_requests_total{{path="{path}",status="{status}"}} {number}'
                      for (path, status), number in sorted(self._requests.items())]
            for name, meaning in TIMES.items():
                lines += _head(name, meaning, "histogram") + self._histogram(name)
        for name, (meaning, value) in gauges.items():
            lines += [*_head(name, meaning, "gauge"), f"modellink_{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> list[str]:
        total, lines = 0, []
        for bound, number in zip([*map(str, BOUNDS), "+Inf"], self._times[name], strict=True):
            total += number
            lines.append(f'modellink_{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"modellink_{name}_sum {self._sums[name]:g}", f"modellink_{name}_count {total}"]


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP modellink_{name} {meaning}", f"# TYPE modellink_{name} {kind}"]
