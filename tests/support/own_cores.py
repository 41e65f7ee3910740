# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that gives each process of pytest-xdist its own cores.

The ranks of a test wait for each other all the time. On cores that they share with the ranks of another test, a message
waits until the scheduler runs its receiver, which costs more than fewer cores do.
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    worker: dict[str, object] | None = getattr(config, "workerinput", None)
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores, count = sorted(os.sched_getaffinity(0)), int(str(worker["workercount"]))
    own = cores[int(str(worker["workerid"]).removeprefix("gw"))::count]
    if own:
        os.sched_setaffinity(0, own)  # the processes that a test starts inherit it
