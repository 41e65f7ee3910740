"""Starting a confined process, watching what its whole tree uses, and ending it; nothing of it outlives `Confined.end`."""

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
    """One process and all it starts.

    Args:
        told: what the script inside is told (`role`, `entry`, handles by name); `data` is given to it unseen by others.
        handles: those it inherits.
        tool: the path of what makes its namespaces, `unshare` or `bwrap`.
        folder: its working folder where it has no namespaces.
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
        """Bytes that the processes of the tree hold, each page of several processes counted once where the kernel says so."""
        return sum(map(_held, _tree(self._process.pid)))

    def over(self) -> bool:
        """Whether the tree holds more memory than it may; a control group sees to that by itself."""
        return self.memory() > self.limits.memory

    def end(self) -> None:
        """Kill the tree: process 1 of its namespace first, with which all others go."""
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
    """A process and all its descendants, parents first."""
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
    """An empty folder, for a process without namespaces."""
    return tempfile.TemporaryDirectory(prefix="modellink-sandbox-", ignore_cleanup_errors=True)
