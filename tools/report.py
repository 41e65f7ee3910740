# SPDX-License-Identifier: Apache-2.0
"""The summary of a nox run: minutes of each session against its share, disk usage, and the closing line.

Counts come from the junit files of pytest in `.nox/results/`; a session without one (lint, types, release-*) counts as
one check. A session that fails outside its tests (an install, a crash) counts as one failure, so that the closing line
never reports "0 failed" while nox exits with 1. The summary is printed by `atexit`, after that of nox, so that the
closing line is the last line. A share is compared with the minutes without installation, which depend on the network and
on which session fills a shared environment; the total is compared with all minutes. A session over its share is marked
OVER; it does not fail.
"""

from __future__ import annotations

import atexit
import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DISK_LIMIT_GB = 10
TOTAL_MINUTES = 26

# (label, minutes on 2 idle cores, sessions that share them)
SHARES: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("kernels", 1.5, ("tests-kernels",)),
    ("convert", 3.5, ("tests-ckpt-convert",)),
    ("data-prep", 2.5, ("tests-data-prep",)),
    ("core", 8, ("tests-core",)),
    ("infer", 4, ("tests-infer",)),
    ("eval", 1.5, ("tests-eval",)),
    ("npu", 1.5, ("npu",)),
    ("e2e", 2.5, ("e2e",)),
    ("lint, types", 0.8, ("lint", "types")),
    ("release", 0.2, tuple(f"release-{name}" for name in ("kernels", "ckpt-convert", "data-prep", "core", "infer", "eval"))),
    ("quickstart", 10, ("quickstart",)),
)


@dataclass
class Entry:
    """One session: total seconds, seconds spent in pip, and its status."""

    name: str
    seconds: float = 0.0
    install_seconds: float = 0.0
    status: str = "failed"

    @contextmanager
    def installing(self) -> Iterator[None]:
        """Count the time of the block as installation."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.install_seconds += time.monotonic() - start


class Report:
    """Collects the sessions of this process and prints the summary when it ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results = root / ".nox" / "results"
        self.entries: list[Entry] = []

    def junit(self, session: str) -> Path:
        return self.results / f"{session}.xml"

    def begin(self, session: str) -> Entry:
        if not self.entries:
            atexit.register(self.print)
        self.results.mkdir(parents=True, exist_ok=True)
        self.junit(session).unlink(missing_ok=True)
        entry = Entry(session)
        self.entries.append(entry)
        return entry

    def counts(self, entry: Entry) -> tuple[int, int, int]:
        """(passed, failed, skipped) of a session."""
        passed, failed, skipped = 0, 0, 0
        if not self.junit(entry.name).exists():
            return {"passed": (1, 0, 0), "skipped": (0, 0, 1)}.get(entry.status, (0, 1, 0))
        try:
            suites = list(ElementTree.parse(self.junit(entry.name)).getroot().iter("testsuite"))
        except ElementTree.ParseError:
            suites = []
        for suite in suites:
            bad, skips = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
            passed, failed, skipped = passed + int(suite.get("tests", 0)) - bad - skips, failed + bad, skipped + skips
        if entry.status == "failed" and not failed:
            failed = 1
        return passed, failed, skipped

    def print(self) -> None:
        print(f"\n{'session':<26}{'install':>9}{'tests':>9}{'minutes':>9}  passed failed skipped")
        total = [0, 0, 0]
        for entry in self.entries:
            counts = self.counts(entry)
            total = [a + b for a, b in zip(total, counts, strict=True)]
            install, whole = entry.install_seconds, entry.seconds
            minutes = f"{_minutes(install)}{_minutes(whole - install)}{_minutes(whole)}"
            print(f"{entry.name:<26}{minutes}  {counts[0]:>6}{counts[1]:>7}{counts[2]:>8}")
        print(f"\n{'against the share':<26}{'install':>9}{'tests':>9}{'minutes':>9}{'share':>8}")
        for label, share, names in SHARES:
            entries = [entry for entry in self.entries if entry.name in names]
            if entries:
                self._print_share(label, share, entries)
        self._print_share("together", TOTAL_MINUTES, self.entries, with_install=True)
        used = disk_bytes([self.root / name for name in (".nox", ".cache", "quickstart", "results")]) / 1e9
        print(f"disk: {used:.1f} GB of at most {DISK_LIMIT_GB}{'  OVER' if used > DISK_LIMIT_GB else ''}\n")
        print(f"{total[0]} passed, {total[1]} failed" + (f", {total[2]} skipped" if total[2] else ""), flush=True)

    def _print_share(self, label: str, share: float, entries: list[Entry], with_install: bool = False) -> None:
        install, whole = sum(e.install_seconds for e in entries), sum(e.seconds for e in entries)
        over = "  OVER" if whole - (0 if with_install else install) > share * 60 else ""
        print(f"{label:<26}{_minutes(install)}{_minutes(whole - install)}{_minutes(whole)}{share:>8g}{over}")


def disk_bytes(folders: list[Path]) -> int:
    """Return the bytes on disk below `folders`; a hard-linked file counts once, symbolic links do not count."""
    seen: set[tuple[int, int]] = set()
    total, stack = 0, [folder for folder in folders if folder.is_dir()]
    while stack:
        for item in os.scandir(stack.pop()):
            if item.is_symlink():
                continue
            if item.is_dir():
                stack.append(Path(item.path))
                continue
            stat = item.stat()
            if stat.st_nlink > 1:
                if (stat.st_dev, stat.st_ino) in seen:
                    continue
                seen.add((stat.st_dev, stat.st_ino))
            total += stat.st_blocks * 512
    return total


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:>9.1f}"
