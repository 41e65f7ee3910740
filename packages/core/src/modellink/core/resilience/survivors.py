# SPDX-License-Identifier: Apache-2.0
"""The surviving ranks of a failure agree on a step to save, and on who saves it.

Each rank reports its progress; the first one decides for all when every rank that can has reported. Not here: how a
rank learns of a failure (watch.py), and what it does then (guard.py).
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

PATIENCE = 60.0  # seconds to wait for a rank that is not known to be dead


@dataclass(frozen=True)
class RankState:
    """The state of one rank.

    Attributes:
        iteration: finished iterations.
        phase: of the next iteration (commit.py).
        place: tensor, context, pipeline and data-parallel index.
        copied: the rank can return to the start of the step.
    """

    iteration: int
    phase: str
    place: tuple[int, int, int, int]
    copied: bool


@dataclass(frozen=True)
class RecoveryPlan:
    """What the survivors do.

    Attributes:
        iteration: the iteration that all of them finish first.
        ranks: members of the new process groups, in this order.
        dp: data parallel size of the new groups.
        why: the cause, for the log.
    """

    action: Literal["save", "replay", "lost"]
    iteration: int
    ranks: list[int]
    dp: int
    why: str


def place() -> tuple[int, int, int, int]:
    """Tensor, context, pipeline and data-parallel index of this rank."""
    return (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank())


def fewest(layout: ParallelLayout, instances: int, *, distributed: bool) -> int:
    """Number of data-parallel ranks that together hold the full state: those of one instance of the distributed optimizer, or
    those that experts are sharded across."""
    return layout.dp // instances if distributed else layout.ep // gcd(layout.ep, layout.cp)


def agree(store: dist.Store, rank: int, world_size: int, mine: RankState, layout: ParallelLayout, dp: int,
          patience: float) -> RecoveryPlan:
    """Agree on what the surviving ranks do next; each of them calls it.

    Args:
        store: keys of these process groups.
        dp: data-parallel ranks that a save needs.
        patience: seconds to wait for ranks that may still report.
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
    """The plan for survivors with these states, by rank."""
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
