"""The survivors of a failure agree on what they have, and on who does what.

Each says how far it is; the first to come decides for all when everybody is there who can be. Not here: how a rank learns of a
failure (watch.py), and what it does then (guard.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import gcd
from typing import Literal

import torch.distributed as dist
from megatron.core import parallel_state

from modellink.core.resilience.watch import Failure, read
from modellink.kernels.parallel import ParallelLayout

PATIENCE = 60.0  # seconds for a rank that is not known to be dead


@dataclass(frozen=True)
class RankState:
    """Of one rank: finished iterations, the phase of the next, its place, and whether it could go back to the step's start."""

    iteration: int
    phase: str
    place: tuple[int, int, int, int]
    copied: bool


@dataclass(frozen=True)
class RecoveryPlan:
    """`ranks` make the groups that `action` needs, in that order; all are to have finished `iteration`."""

    action: Literal["save", "replay", "lost"]
    iteration: int
    ranks: list[int]
    dp: int
    why: str


def place() -> tuple[int, int, int, int]:
    """This rank's tensor, context, pipeline and data-parallel index."""
    return (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank())


def fewest(layout: ParallelLayout, instances: int, *, distributed: bool) -> int:
    """How many data-parallel ranks hold a whole state between them: those of one instance of the distributed optimizer, else
    as many as the experts are dealt to."""
    return layout.dp // instances if distributed else layout.ep // gcd(layout.ep, layout.cp)


def agree(store: dist.Store, rank: int, world_size: int, mine: RankState, layout: ParallelLayout, dp: int,
          patience: float) -> RecoveryPlan:
    """What all ranks that are left do next; each calls it.

    Args:
        store: of these process groups.
        dp: data-parallel ranks a save needs.
        patience: seconds to wait for ranks that may still come.
    """
    store.set(f"here/{rank}", json.dumps(asdict(mine)))
    if store.compare_set("leader", "", str(rank)).decode() == str(rank):
        deadline = time.monotonic() + patience
        while True:
            failure = read(store) or Failure("unknown")
            here = {number for number in range(world_size) if store.check([f"here/{number}"])}
            if here >= set(range(world_size)) - set(failure.dead) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        states = {number: RankState(**json.loads(store.get(f"here/{number}"))) for number in sorted(here)}
        store.set("plan", json.dumps(asdict(decide(states, failure, world_size, layout, dp))))
    return RecoveryPlan(**json.loads(store.get("plan")))


def decide(states: Mapping[int, RankState], failure: Failure, world_size: int, layout: ParallelLayout, dp: int) -> RecoveryPlan:
    """By rank, how far the survivors are -> what they do."""
    iteration = max(state.iteration + (state.phase == "applying") for state in states.values())
    if failure.repairable and len(states) == world_size and all(state.copied for state in states.values()):
        return RecoveryPlan("replay", iteration, list(range(world_size)), layout.dp, failure.what)
    ranks = []
    for wanted in ((t, c, p, d) for p in range(layout.pp) for d in range(dp) for c in range(layout.cp) for t in range(layout.tp)):
        holders = [number for number, state in states.items() if (*state.place[:3], state.place[3] % dp) == wanted]
        if not holders:
            part = (f"tensor-parallel rank {wanted[0]}, context-parallel rank {wanted[1]}, stage {wanted[2]}, "
                    f"shard {wanted[3]}")
            return RecoveryPlan("lost", iteration, [], dp, f"{failure.what}; no remaining rank holds the part of {part}")
        ranks.append(holders[0])
    return RecoveryPlan("save", iteration, ranks, dp, failure.what)
