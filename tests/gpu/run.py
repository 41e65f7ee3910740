# SPDX-License-Identifier: Apache-2.0
"""Check ModelLink on one GPU: doctor, every op against its plain form, training, decoding, conversion, speed.

    python tests/gpu/run.py --pack FOLDER --python 3.12       collect wheels for the machine with the GPU
    python tests/gpu/run.py --wheels FOLDER --json gpu.json   there: install them next to its torch, and check
    python tests/gpu/run.py --device cpu                      check on the CPU, with the installed packages

Prints a table and exits with status 1 if a row failed. README.md explains how to add rows.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS, CALL_SECONDS = 330.0, 100.0  # defaults of --seconds and --call-seconds
DETAIL, TRACE = 160, 2500  # characters of a result and of a trace on the console; JSON has the full text


def main(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    try:
        if given.pack is not None:
            return collect(given.pack, given.python)
        if given.wheels is not None:
            return run_with_wheels(given.wheels, arguments)
    except Exception as error:
        from pack import PackError
        if not isinstance(error, PackError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return check(given)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="run.py", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("auto", "cuda", "npu", "cpu"), default="auto",
                      help="Device to check. Default: auto.")
    made.add_argument("--only", nargs="+", metavar="TEXT", default=[],
                      help="Run only rows whose name contains one of these.")
    made.add_argument("--list", action="store_true", help="Print the names of the rows.")
    made.add_argument("--json", type=Path, help="Also write the results to this file, after every row.")
    made.add_argument("--seconds", type=float, default=SECONDS,
                      help=f"Time limit; rows that start later are skipped. Default: {SECONDS:.0f}.")
    made.add_argument("--call-seconds", type=float, default=CALL_SECONDS,
                      help="Time limit of one call in the process on the device, after which a row fails. "
                           f"Default: {CALL_SECONDS:.0f}.")
    made.add_argument("--pack", type=Path, metavar="FOLDER", help="Collect the wheels in FOLDER instead.")
    made.add_argument("--python", default=".".join(map(str, sys.version_info[:2])),
                      help="With --pack: Python version of the machine. Default: that of this interpreter.")
    made.add_argument("--wheels", type=Path, metavar="FOLDER",
                      help="Install the wheels of FOLDER in a temporary environment that also has the "
                           "packages of this interpreter, and check there.")
    return made


def collect(folder: Path, python: str) -> int:
    from pack import pack

    files = pack(folder, python)
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{len(files)} wheels for Python {python}, {size:.1f} MiB, in {folder}")
    return 0


def run_with_wheels(wheels: Path, arguments: Sequence[str]) -> int:
    """Run this script again in a new environment, with the same arguments except --wheels."""
    from pack import environment

    start = time.monotonic()
    rest, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--wheels"):
            rest.append(argument)
        skip = argument == "--wheels"
    with tempfile.TemporaryDirectory(prefix="modellink-gpu-") as folder:
        python = environment(wheels, Path(folder) / "env")
        print(f"environment with the wheels of {wheels}: {time.monotonic() - start:.1f} s", flush=True)
        return subprocess.call([python, str(Path(__file__).resolve()), *rest])


def check(given: argparse.Namespace) -> int:
    """Run the rows, print each result, and return the exit status."""
    from registry import Machine, load_rows, run_rows

    every = load_rows()
    rows = [row for row in every if not given.only or any(text in row.name for text in given.only)]
    if given.list or not rows:
        print("\n".join(row.name for row in every))
        return 0 if given.list else 2
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modellink-gpu-")))
        log = stack.enter_context((folder / "log").open("wb"))
        machine = Machine(given.device, folder, log, start + given.seconds, given.call_seconds)
        stack.callback(machine.stop)
        report = Report(width=max(len(row.name) for row in rows), json=given.json)
        try:
            report.device = machine.find()
        except Exception as error:  # the rows that need the device will fail
            report.device = {"error": str(error)}
        for result in run_rows(rows, machine):
            report.add(result, time.monotonic() - start)
    return report.end(time.monotonic() - start)


class Report:
    """The table on the console and the JSON file.

    Args:
        width: columns of the longest name.
        json: the file; None: none.
    """

    def __init__(self, width: int, json: Path | None) -> None:
        self.device: dict[str, Any] = {}
        self._width, self._json = width, json
        self._results: list[Any] = []
        print(f"{'row':{width}}  {'s':>5}  status   result", flush=True)

    def add(self, result: Any, seconds: float) -> None:
        """Print the line of a result and write the file."""
        self._results.append(result)
        name = result.name.ljust(self._width)
        print(f"{name}  {result.seconds:5.1f}  {result.status:7}  {result.detail[:DETAIL]}", flush=True)
        if self._json is not None:
            from modellink.kernels.files import write_json  # under a temporary name first

            write_json(self._json, {"device": self.device, "seconds": round(seconds, 1), **self._counts(),
                                    "rows": [one.json() for one in self._results]})

    def _counts(self) -> dict[str, int]:
        statuses = [result.status for result in self._results]
        return {status: statuses.count(status) for status in ("passed", "failed", "skipped")}

    def end(self, seconds: float) -> int:
        """Print the traces of failed rows and the summary; return the exit status."""
        for result in self._results:
            if result.status == "failed":
                print(f"\n{result.name}\n{result.trace[-TRACE:].rstrip()}")
        summary = ", ".join(f"{count} {status}" for status, count in self._counts().items())
        print(f"\n{summary} in {seconds:.0f} s", flush=True)
        return int(self._counts()["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
