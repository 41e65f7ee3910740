# SPDX-License-Identifier: Apache-2.0
"""The rows of the GPU check: their registry, what they run on, and running them in order.

A row is a function `check(machine) -> text` with the decorator `row(name)`, in a file of checks/. It returns
facts for the table, raises `Skipped` with a reason, or fails with any other exception. It runs in a process
without torch; what needs torch is a function that `machine.on_device` or `machine.on_cpu` calls in another
process, so that a crash or a hang costs one row. Not here: command line and output (run.py).
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "support"))
LOG_LINES = 15  # of what a process printed before it failed
FIRST, LAST = ("environment", "ops", "training", "decode"), ("speed",)  # files of checks/
Check = Callable[["Machine"], str]


class Skipped(Exception):
    """The row does not apply here; the message is the reason."""


class Failed(Exception):
    """The row found a wrong result."""


def require(condition: bool, message: str) -> None:
    """Raise `Failed` with the message unless the condition holds."""
    if not condition:
        raise Failed(message)


@dataclass(frozen=True)
class Row:
    name: str
    check: Check


@dataclass(frozen=True)
class Result:
    """The outcome of a row.

    Attributes:
        status: passed, failed or skipped.
        detail: one line: facts, the reason, or the error.
        trace: of a failed row.
    """

    name: str
    status: str
    seconds: float
    detail: str
    trace: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": round(self.seconds, 2)}


ROWS: list[Row] = []


def row(name: str) -> Callable[[Check], Check]:
    """Register a function as the row `name`: "topic: what it shows"."""

    def register(check: Check) -> Check:
        ROWS.append(Row(name, check))
        return check

    return register


def load_rows() -> list[Row]:
    """Import every file of checks/, those of FIRST and LAST in their order, and return all rows."""
    files = {path.stem for path in (HERE / "checks").glob("*.py")}
    others = sorted(files - {*FIRST, *LAST})
    for name in (*FIRST, *others, *LAST):
        importlib.import_module(f"checks.{name}")
    return ROWS


class Machine:
    """The device that is checked: a process on it, one on the CPU to compare with, and a folder for files.

    Args:
        kind: auto, cuda, npu or cpu.
        log: file for what the processes print.

    Attributes:
        kind: that of the device found, "auto" until `find` was called.
        deadline: `time.monotonic()` at which the check must be over.
        call_seconds: time limit of a call in another process, which includes starting it.
    """

    def __init__(self, kind: str, folder: Path, log: IO[bytes], deadline: float, call_seconds: float) -> None:
        self.kind, self.folder, self.deadline, self.call_seconds = kind, folder, deadline, call_seconds
        self._log = log
        self._ranks: dict[str, Any] = {}
        self._known: dict[Hashable, Any] = {}

    def find(self) -> dict[str, Any]:
        """Return facts about the device (device_facts.py), and replace a kind of "auto"."""
        from device_facts import device_facts
        facts: dict[str, Any] = self.once("device", lambda: self.on_device(device_facts))
        if self.kind == "auto":
            self._ranks[facts["kind"]] = self._ranks.pop("auto")
            self.kind = facts["kind"]
        return facts

    def on_device(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Call a module-level function in the process on the device; arguments and result are pickled."""
        return self._on(self.kind, function, arguments)

    def on_cpu(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Call it in a process whose megatron-core is on the CPU."""
        return self._on("cpu", function, arguments)

    def _on(self, kind: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        from ranks import Ranks
        if kind not in self._ranks:
            self._ranks[kind] = Ranks(1, (str(HERE / "rank.py"), kind), self._log)
        ranks = self._ranks[kind]
        ranks.seconds = max(1.0, min(self.call_seconds, self.deadline - time.monotonic()))
        try:
            return ranks(function, **arguments)[0]
        except AssertionError as error:
            raise Failed(f"{self._tail()}{error}") from None

    def _tail(self) -> str:
        self._log.flush()
        lines = Path(self._log.name).read_text("utf-8", "replace").splitlines()
        return "".join(f"| {line}\n" for line in lines[-LOG_LINES:])

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returned, or raise what it raised, when it was first called with this key."""
        if key not in self._known:
            try:
                self._known[key] = make()
            except Exception as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        for ranks in self._ranks.values():
            ranks.stop()


def run_rows(rows: Sequence[Row], machine: Machine) -> Iterator[Result]:
    """Run the rows in order and yield each result; after the deadline the remaining rows are skipped."""
    for item in rows:
        start = time.monotonic()
        trace = ""
        try:
            if start > machine.deadline:
                raise Skipped("there was no time left")
            status, detail = "passed", item.check(machine)
        except Skipped as reason:
            status, detail = "skipped", str(reason)
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            status, detail = "failed", text.splitlines()[-1]
            trace = text if isinstance(error, Failed) else traceback.format_exc()
        yield Result(item.name, status, time.monotonic() - start, detail, trace)
