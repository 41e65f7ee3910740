# SPDX-License-Identifier: Apache-2.0
"""Run commands in order: each is printed as typed, timed, and its memory measured; a table follows at the end."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table


def memory(process: psutil.Process) -> int:
    """Return the resident bytes of a process and its descendants; on Linux, shared pages are divided among them (PSS)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss if sys.platform == "linux" else one.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class Steps:
    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.console = Console()

    def title(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold")

    def run(self, name: str, *command: object, expect: int = 0) -> None:
        """Run and record a command; exit if its status is not `expect`."""
        words = [str(word) for word in command]
        shown = ["python" if word == sys.executable else word for word in words]
        print(f"$ {shlex.join(shown)}", flush=True)
        found = shutil.which(words[0], path=str(Path(sys.executable).parent)) or shutil.which(words[0])
        if found is None:
            sys.exit(f"{words[0]} is not installed: run this job with `python -m nox -s quickstart`")
        start, peak = time.monotonic(), 0
        process = psutil.Popen([found, *words[1:]])
        while process.poll() is None:
            try:
                peak = max(peak, memory(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.25)
        status = process.wait()
        self.rows.append({"step": name, "seconds": round(time.monotonic() - start, 1), "peak_bytes": peak})
        if status != expect:
            print(f"step {name!r} ended with status {status}", file=sys.stderr)
            sys.exit(status if status > 0 else 1)
        if expect:
            print(f"(status {status}: refused, as it should be)")

    def table(self, path: Path) -> None:
        """Print time and memory of every step, and write them to `path` as JSON."""
        table = Table("step", "seconds", "peak memory (MB)", title="\nwhat it took", title_justify="left")
        for row in self.rows:
            table.add_row(str(row["step"]), f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:,.0f}")
        table.add_section()
        table.add_row("all", f"{sum(row['seconds'] for row in self.rows):.1f}",
                      f"{max(row['peak_bytes'] for row in self.rows) / 1e6:,.0f}")
        self.console.print(table)
        path.write_text(json.dumps(self.rows, indent=2) + "\n")
