"""Faults for trials: what fails, on which rank, in which step, and where in it (`--inject-fault`).

Each strikes once in the life of a run: that it did is noted where restarts do not reach, in the agent's store.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from modellink.kernels.errors import ModelLinkError

KINDS = ("exception", "kill", "hang", "nan", "corrupt", "memory", "disk", "slow")
PLACES = ("start", "update", "end", "repair", "random")
SLOW, LATEST = 2.0, 1.0  # seconds a slow rank rests; after which a fault at a random place has struck


class RepairableFault(RuntimeError):
    """The memory of a device lost something, and the device goes on."""


@dataclass(frozen=True)
class Fault:
    """`when`: as the step starts, before it changes weights, behind it, as it is made anew after another fault, or at a random
    moment; `probability` with `seed` decides once."""

    kind: str
    step: int
    rank: int
    when: str = "start"
    probability: float = 1.0
    seed: int = 0

    def chosen(self) -> bool:
        return random.Random(f"{self.seed} {self.step} {self.rank} {self.kind}").random() < self.probability


def read_faults(text: str | None) -> list[Fault]:
    """`kind=kill,step=3,rank=1;...` as faults.

    Raises:
        ModelLinkError: it does not say one.
    """
    return [_read(part) for part in (text or "").split(";") if part.strip()]


def _read(part: str) -> Fault:
    given = dict(item.strip().partition("=")[::2] for item in part.split(","))
    kinds: dict[str, Any] = {"step": int, "rank": int, "probability": float, "seed": int}
    try:
        fault = Fault(**{name: kinds.get(name, str)(value) for name, value in given.items()})
    except (TypeError, ValueError):
        raise ModelLinkError(f"{part!r} does not say a fault", where="--inject-fault", fix="name=value with commas between, of "
                             + ", ".join(field.name for field in fields(Fault)) + "; kind, step and rank are needed") from None
    for value, known, name in ((fault.kind, KINDS, "kind"), (fault.when, PLACES, "when")):
        if value not in known:
            raise ModelLinkError(f"{value!r} is no {name} of fault", where="--inject-fault", fix=f"one of {', '.join(known)}")
    return fault


class Faults:
    """The faults of this rank.

    Args:
        store: of the agent.
    """

    def __init__(self, faults: Sequence[Fault], rank: int, store: Any) -> None:
        self._mine = [(number, fault) for number, fault in enumerate(faults) if fault.rank == rank and fault.chosen()]
        self._store = store

    def strike(self, step: int, place: str, models: Sequence[Any]) -> None:
        """Let happen what is to happen in this step at this place."""
        for number, fault in self._mine:
            if fault.step == step and (fault.when == place or (fault.when == "random" and place == "start")) \
                    and fault.kind != "disk" and self._first(number):
                self._let(fault, models)

    def disk_is_full(self, step: int) -> bool:
        """Whether the save after this step finds no room."""
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
