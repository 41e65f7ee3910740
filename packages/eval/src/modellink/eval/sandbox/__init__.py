# SPDX-License-Identifier: Apache-2.0
"""Run generated programs, which may do anything, isolated from this machine.

See `Sandbox`; the README.md of this folder documents what is contained and what is not.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from modellink.eval.sandbox.limits import Limits
from modellink.eval.sandbox.process import Confined, folder
from modellink.kernels.errors import ModelLinkError

Isolation = Literal["namespaces", "none"]
DEFAULT = Limits()
POLL = 0.02  # seconds between two checks of the memory
TOOLS = ("unshare", "bwrap")  # programs that create namespaces; the first one that works is used
PROBE_SECONDS = 60  # time limit of the probe program; generous, since the machine may be busy
PROBE = ("def probe():\n", "def probe():\n    return 41 + 1\n", "assert probe() == 42\n")


class Sandbox:
    """Runs programs, each in fresh processes.

    Args:
        isolation: `namespaces`: own user, network, mount, pid, ipc and host name, a root folder with only the system
            libraries and the interpreter, no privileges. `none`: only limits, and another user if started as root.
        tools: programs that create namespaces, `unshare` of util-linux and `bwrap` of bubblewrap.

    Attributes:
        tool: path of the program in use.

    Raises:
        ModelLinkError: this machine does not support the isolation.
    """

    def __init__(self, isolation: Isolation = "namespaces", limits: Limits = DEFAULT, workers: int | None = None,
                 tools: Sequence[str] = TOOLS) -> None:
        self.isolation, self.tool = isolation, ""
        self.workers = workers or min(8, os.cpu_count() or 1)
        if isolation == "namespaces":
            self.limits = replace(limits, seconds=PROBE_SECONDS, cpu_seconds=PROBE_SECONDS)
            self._choose(tools)
        self.limits = limits

    def _choose(self, tools: Sequence[str]) -> None:
        reasons = []
        for name in tools:
            self.tool = shutil.which(name) or ""
            verdict = self.passes("", PROBE[1], PROBE[2], "probe") if self.tool else "it is not installed"
            if verdict == "passed":
                return
            reasons.append(f"{name}: {verdict.removeprefix('failed: ')}")
        raise ModelLinkError(f"programs cannot be isolated here ({'; '.join(reasons)})", where="--allow-code-execution",
                             fix="allow user namespaces, install bubblewrap or start as root; or, on a disposable machine, "
                             "pass --isolation none")

    def passes(self, prompt: str, program: str, test: str, entry: str) -> str:
        """Run a program and its test; return `passed` or the reason of the failure.

        Args:
            prompt: text of the data set before the program; the test may use helpers in it.
            program: the complete program.
            test: a program that fails if a result of `entry` is wrong.
            entry: name of the tested function; in the test it is a stub that calls the other process.
        """
        to_candidate, to_judge, verdict = os.pipe(), os.pipe(), os.pipe()
        with folder() as first, folder() as second:
            started: list[Confined] = []
            try:
                for told, data, handles, place in (
                    ({"role": "candidate", "listen": to_candidate[0], "reply": to_judge[1]},
                     {"program": program, "entry": entry}, (to_candidate[0], to_judge[1]), first),
                    ({"role": "judge", "listen": to_judge[0], "reply": to_candidate[1], "verdict": verdict[1]},
                     {"prompt": prompt, "test": test, "entry": entry}, (to_judge[0], to_candidate[1], verdict[1]), second)):
                    told["error"] = verdict[1] if told["role"] == "judge" else to_judge[1]
                    started.append(Confined(told, data, handles, self.limits, self.isolation, self.tool, place))
                for handle in (*to_candidate, *to_judge, verdict[1]):
                    os.close(handle)
                return self._watch(verdict[0], started)
            finally:
                for process in started:
                    process.end()
                os.close(verdict[0])

    def _watch(self, handle: int, processes: list[Confined]) -> str:
        end = time.monotonic() + self.limits.seconds
        held = b""
        while not held.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0:
                return f"failed: timeout after {self.limits.seconds:g} seconds"
            if select.select([handle], [], [], min(POLL, left))[0]:
                piece = os.read(handle, 1 << 16)
                if not piece:
                    return "failed: the test was terminated"
                held += piece
            elif any(process.over() for process in processes):
                return f"failed: more than {self.limits.memory >> 20} MB of memory"
        return str(json.loads(held)["verdict"])


__all__ = ["Isolation", "Limits", "Sandbox"]
