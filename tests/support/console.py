# SPDX-License-Identifier: Apache-2.0
"""Runs console commands of the installed packages, several in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

RUN = """
import contextlib, importlib.metadata, io, json, sys
for words in json.loads(sys.argv[1]):
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
    sys.argv = list(words)
    output, errors, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            entry.load()()
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, output.getvalue(), errors.getvalue(), "torch" in sys.modules]))
"""


def call(*calls: list[str], cwd: Path | None = None,
         environment: Mapping[str, str] | None = None) -> list[tuple[int, str, str, bool]]:
    """Run commands in one process; return status, output, errors and whether torch is imported by then, for each."""
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(calls)], capture_output=True, text=True, check=True, cwd=cwd,
                          env=os.environ | dict(environment or {}))
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]
