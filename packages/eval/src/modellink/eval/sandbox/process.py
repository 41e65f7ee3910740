# SPDX-License-Identifier: Apache-2.0
"""Start a confined process, monitor the memory of its process tree, and kill it; no process survives `Confined.end`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from modellink.eval.sandbox import cgroup
from modellink.eval.sandbox.limits import Limits

HERE = Path(__file__).parent
KEPT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Confined:
    """One process and all processes it starts.

    Args:
        told: arguments of the script inside (`role`, `entry`, handles by name); `data` is passed privately.
        handles: inherited file descriptors.
        tool: path of the program that creates the namespaces, `unshare` or `bwrap`.
        folder: working folder without namespaces.
    """

    def __init__(self, told: dict[str, Any], data: dict[str, Any], handles: tuple[int, ...], limits: Limits, isolation: str,
                 tool: str, folder: str) -> None:
        self.limits = limits
        self._group = cgroup.make(limits)
        held = os.memfd_create("part")
        os.write(held, json.dumps(data).encode())
        os.lseek(held, 0, os.SEEK_SET)
        visible = list(dict.fromkeys((sys.base_prefix, sys.prefix, str(HERE))))
        told = told | {"data": held, "limits": limits.asdict(), "isolation": isolation, "tool": tool, "folder": folder,
                       "root": os.geteuid() == 0, "visible": [os.path.realpath(path) for path in visible] + [
                           path for path in visible if os.path.realpath(path) != path]}
        home = "/sandbox" if isolation != "none" else folder
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(HERE / "confine.py"), "enter", json.dumps(told)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            pass_fds=(*handles, held), env=KEPT | {"HOME": home, "TMPDIR": home}, cwd="/")
        os.close(held)
        if self._group is not None:
            self._group.add(self._process.pid)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()

    def memory(self) -> int:
        """Return the bytes of memory of the process tree; shared pages count once if the kernel reports them."""
        return sum(map(_held, _tree(self._process.pid)))

    def over(self) -> bool:
        """Return whether the tree exceeds its memory limit; a control group enforces it by itself."""
        return self.memory() > self.limits.memory

    def end(self) -> None:
        """Kill the tree: first process 1 of its namespace, which takes all others with it."""
        for _ in range(20):
            tree = _tree(self._process.pid)
            for pid in reversed(tree):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if len(tree) <= 1:
                break
        self._process.wait()
        if self._group is not None:
            self._group.remove()


def _tree(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _held(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def folder() -> tempfile.TemporaryDirectory[str]:
    """Create an empty folder for a process without namespaces."""
    return tempfile.TemporaryDirectory(prefix="modellink-sandbox-", ignore_cleanup_errors=True)
