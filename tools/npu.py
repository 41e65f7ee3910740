# SPDX-License-Identifier: Apache-2.0
"""Prepare the nox session `npu`: torch_npu in a separate folder, and stubs of CANN.

torch_npu modifies torch wherever it can be imported, so it is never installed into an environment of other sessions.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "tests" / "npu" / "stubs.py"
SOURCES = (STUBS, STUBS.with_name("host_runtime.c"))


def version() -> str:
    """The version that was tested."""
    found = re.search(r"^torch-npu==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert found
    return found[1]


def unfit() -> str | None:
    """Why this machine cannot run the session."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the stand-ins for CANN are for x86_64 Linux, this is {platform.machine()} {sys.platform}"
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)} here, which make the stand-ins for CANN" if missing else None


def prepare(folder: Path, python: Path) -> str | None:
    """Fill `folder` with `wheel` and `stubs`, where they are not there yet; why that was not possible."""
    if reason := unfit():
        return reason
    stamp, wanted = folder / "made_for", "\n".join([version(), *(source.read_text("utf-8") for source in SOURCES)])
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target",
                           folder / "wheel", f"torch-npu=={version()}"], capture_output=True, text=True)
    if done.returncode:
        return f"torch-npu {version()} cannot be had: {done.stderr.strip().splitlines()[-1]}"
    subprocess.run([python, STUBS, folder / "wheel", folder / "stubs"], check=True)
    stamp.write_text(wanted, "utf-8")
    return None
