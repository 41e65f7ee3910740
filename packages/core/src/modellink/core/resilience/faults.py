# SPDX-License-Identifier: Apache-2.0
"""Injects the faults of `--inject-fault` into a running training.

Each fault strikes once in the life of a run: the agent's store, which survives restarts, records that it has.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from modellink.core.config.faults import Fault

SLOW = 2.0  # seconds that a slow rank sleeps
LATEST = 1.0  # seconds after the start of a step within which a fault at a random moment has struck


class RepairableFault(RuntimeError):
    """Device memory was corrupted, but the device still works."""


class Faults:
    """The faults of this rank.

    Args:
        store: the store of the agent.
    """

    def __init__(self, faults: Sequence[Fault], rank: int, store: Any) -> None:
        self._mine = [(number, fault) for number, fault in enumerate(faults) if fault.rank == rank and fault.chosen()]
        self._store = store

    def strike(self, step: int, place: str, models: Sequence[Any]) -> None:
        """Inject the faults that are due in this step at this moment."""
        for number, fault in self._mine:
            if fault.step == step and (fault.when == place or (fault.when == "random" and place == "start")) \
                    and fault.kind != "disk" and self._first(number):
                self._let(fault, models)

    def disk_is_full(self, step: int) -> bool:
        """Whether the save after this step should fail for lack of disk space."""
        return any(fault.kind == "disk" and fault.step == step and self._first(number) for number, fault in self._mine)

    def _first(self, number: int) -> bool:
        return int(self._store.add(f"fault/{number}", 1)) == 1

    def _let(self, fault: Fault, models: Sequence[Any]) -> None:
        print(f"injected fault: {fault.kind} in step {fault.step} on rank {fault.rank}", flush=True)
        if fault.when == "random" and fault.kind == "kill":
            delay = random.Random(fault.seed + fault.step).uniform(0, LATEST)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "hang":
            while True:
                time.sleep(3600)
        elif fault.kind == "slow":
            time.sleep(SLOW)
        elif fault.kind == "exception":
            raise OSError(errno.EIO, "injected fault")
        elif fault.kind == "memory":
            raise RepairableFault("injected fault: memory of the device")
        else:
            parameter = next(parameter for model in models for parameter in model.parameters() if parameter.requires_grad)
            with torch.no_grad():
                parameter.view(-1)[0] = float("nan") if fault.kind == "nan" else parameter.view(-1)[0] * 2 + 1
