# SPDX-License-Identifier: Apache-2.0
"""Faults to inject for testing high availability (`--inject-fault`): what fails, on which rank, in which step and when."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

from modellink.kernels.errors import ModelLinkError

KINDS = ("exception", "kill", "hang", "nan", "corrupt", "memory", "disk", "slow")
PLACES = ("start", "update", "end", "repair", "random")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: one of KINDS.
        step: the iteration it strikes in, from 1.
        rank: the global rank it strikes.
        when: at the start of the step, before the weights are updated, after the step, during a repair that follows
            another fault, or at a random moment.
        probability: chance that the fault happens at all; decided once, by `seed`.
        seed: of that decision and of the random moment.
    """

    kind: str
    step: int
    rank: int
    when: str = "start"
    probability: float = 1.0
    seed: int = 0

    def chosen(self) -> bool:
        """Whether this fault happens."""
        return random.Random(f"{self.seed} {self.step} {self.rank} {self.kind}").random() < self.probability


def read_faults(text: str | None) -> list[Fault]:
    """Parse `kind=kill,step=3,rank=1;...`.

    Raises:
        ModelLinkError: a part is malformed or names an unknown kind or moment.
    """
    return [_read(part) for part in (text or "").split(";") if part.strip()]


def _read(part: str) -> Fault:
    given = dict(item.strip().partition("=")[::2] for item in part.split(","))
    types: dict[str, Any] = {"step": int, "rank": int, "probability": float, "seed": int}
    try:
        fault = Fault(**{name: types.get(name, str)(value) for name, value in given.items()})
    except (TypeError, ValueError):
        names = ", ".join(field.name for field in fields(Fault))
        raise ModelLinkError(f"{part!r} does not describe a fault", where="--inject-fault",
                             fix=f"use comma-separated name=value pairs of {names}; kind, step and rank are required") from None
    for value, known, name in ((fault.kind, KINDS, "kind"), (fault.when, PLACES, "when")):
        if value not in known:
            raise ModelLinkError(f"unknown {name} of fault: {value!r}", where="--inject-fault",
                                 fix=f"use one of {', '.join(known)}")
    return fault
