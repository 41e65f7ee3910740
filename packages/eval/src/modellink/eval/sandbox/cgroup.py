# SPDX-License-Identifier: Apache-2.0
"""A control group for one program, if this process may create one: the kernel limits memory and processes.

Version 2 if its root has the memory controller, else version 1. If neither is writable, only the watchdog of process.py and the
limits of each process apply.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path

from modellink.eval.sandbox.limits import Limits

TOP = Path("/sys/fs/cgroup")
_numbers = itertools.count()


class Group:
    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders

    def add(self, pid: int) -> None:
        for folder in self._folders:
            with contextlib.suppress(OSError):
                (folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Remove the group; its processes are dead, but the kernel may need a moment to notice."""
        for folder in self._folders:
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.01)


def make(limits: Limits) -> Group | None:
    """Create a group, or return None if that is not allowed."""
    name = f"modellink-{os.getpid()}-{next(_numbers)}"
    two = (TOP / "cgroup.controllers").is_file()
    wanted = [(TOP, {"memory.max": limits.memory, "memory.swap.max": 0, "pids.max": limits.processes + 4})] if two else [
        (TOP / "memory", {"memory.limit_in_bytes": limits.memory}), (TOP / "pids", {"pids.max": limits.processes + 4})]
    made: list[Path] = []
    for top, values in wanted:
        folder = top / name
        try:
            folder.mkdir()
        except OSError:
            continue
        made.append(folder)
        for file, value in values.items():
            with contextlib.suppress(OSError):
                (folder / file).write_text(str(value))
    return Group(made) if made else None
