# SPDX-License-Identifier: Apache-2.0
"""For all tests: under nox, the installed wheel is tested, never a source folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parent / "packages"


def pytest_sessionstart(session: pytest.Session) -> None:
    if "MODELLINK_WHEELS" not in os.environ:  # outside nox, an editable installation is allowed
        return
    spec = importlib.util.find_spec("modellink")
    for place in (spec and spec.submodule_search_locations) or ():
        if Path(place).resolve().is_relative_to(PACKAGES):
            pytest.exit(f"modellink is imported from {place}, not from an installed wheel", returncode=3)
