# SPDX-License-Identifier: Apache-2.0
"""What is installed, which device there is, and `modellink-doctor` on it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from pack import UNUSED
from registry import Machine, Skipped, require, row

DISTRIBUTIONS = ("modellink-kernels", "modellink-ckpt-convert", "modellink-data-prep", "modellink-core",
                 "modellink-infer", "modellink-eval", "megatron-core")
DOCTOR_SECONDS = 90


@row("environment: versions satisfy the packages")
def versions(_: Machine) -> str:
    from packaging.requirements import Requirement

    wrong, optional, count = [], set(), 0
    for name in DISTRIBUTIONS:
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            try:
                found = importlib.metadata.version(needed.name)
            except importlib.metadata.PackageNotFoundError:
                if needed.name in UNUSED:
                    optional.add(needed.name)
                    continue
                wrong.append(f"{needed.name} is missing, {name} needs {needed.name}{needed.specifier}")
                continue
            if not needed.specifier.contains(found, prereleases=True):
                wrong.append(f"{needed.name} {found} is installed, {name} needs {needed.specifier}")
            count += 1
    require(not wrong, "; ".join(dict.fromkeys(wrong)))
    note = f"; missing, but no row needs it: {', '.join(sorted(optional))}" if optional else ""
    return f"{count} requirements{note}"


@row("environment: torch finds the device")
def device(machine: Machine) -> str:
    facts = machine.find()
    cuda = f", CUDA {facts['cuda']}" if facts["cuda"] else ""
    memory = f", {facts['memory'] / 2**30:.0f} GiB" if facts["memory"] else ""
    return f"{facts['kind']}: {facts['name']}{memory}, torch {facts['torch']}{cuda}, Python {facts['python']}"


@row("environment: modellink-doctor")
def doctor(machine: Machine) -> str:
    command = Path(sys.executable).with_name("modellink-doctor")
    if not command.exists():
        raise Skipped(f"{command.name} is not next to {Path(sys.executable).name}")
    done = subprocess.run([command, "--device", machine.kind], capture_output=True, text=True,
                          timeout=DOCTOR_SECONDS, env={"OMP_NUM_THREADS": "1"} | os.environ)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong:")]
    require(done.returncode == 0, f"{done.stdout}{done.stderr}\nstatus {done.returncode}: {' '.join(wrong)}")
    good = re.findall(r"\bok\b", done.stdout)
    return f"status 0, {len(good)} uses of ops are ok"
