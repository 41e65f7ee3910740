# SPDX-License-Identifier: Apache-2.0
"""A step changes the weights on all ranks or on none.

Before megatron-core's optimizer changes anything, all ranks agree that they are ready: each then has everything its
own update needs, its reduced and clipped gradients. So if one rank has updated its weights, every other rank can
still do so by itself; and if none has, none needs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

from modellink.core.train.optimizer import inner_optimizers

Phase = Literal["begun", "ready", "applying"]


class StepAborted(Exception):
    """A rank is unhealthy; no rank has changed anything, and all ranks know."""


class Commit:
    """Inserts the agreement before the update of `optimizer`.

    Args:
        well: whether this rank is healthy; called in every step.
    """

    def __init__(self, optimizer: Any, device: torch.device, well: Callable[[], bool]) -> None:
        self._phase: Phase = "begun"
        self._step = 0
        self._optimizer, self._device, self._well = optimizer, device, well
        self._change = optimizer.step_with_ready_grads
        optimizer.step_with_ready_grads = self._agree
        self._steps: list[int] = []

    def begin(self, step: int) -> None:
        """Start step number `step`."""
        self._step, self._phase, self._steps = step, "begun", self._counts()

    def phase(self, finished: int) -> Phase:
        """The phase of the step after `finished` steps; "begun" between steps."""
        return self._phase if finished < self._step else "begun"

    def _agree(self) -> bool:
        unwell = torch.tensor(int(not self._well()), device=self._device)
        self._phase = "ready"
        dist.all_reduce(unwell, op=dist.ReduceOp.MAX)
        if unwell.item():
            raise StepAborted
        self._phase = "applying"
        return bool(self._change())

    def complete(self) -> None:
        """Finish the update on this rank without communication, after the agreement; all ranks do the same."""
        for part, before, now in zip(inner_optimizers(self._optimizer), self._steps, self._counts(), strict=True):
            if now == before:
                part.optimizer.step()

    def _counts(self) -> list[int]:
        return [max((group.get("step", 0) for group in part.optimizer.param_groups), default=0)
                for part in inner_optimizers(self._optimizer)]
