# SPDX-License-Identifier: Apache-2.0
"""Reasons to stop before the last iteration: an interval, a duration or SIGTERM. All ranks stop after the same iteration."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from modellink.core.config import CheckpointConfig

SIGNALLED = "SIGTERM"


class Stop:
    """Within the context SIGTERM is recorded instead of ending the process."""

    def __init__(self, config: CheckpointConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._began, self._signalled = time.monotonic(), False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True

    def reason(self, iteration: int) -> str | None:
        """Why to stop after this iteration, or None; every rank calls it after each iteration."""
        if is_multiple(iteration, self._config.exit_interval):
            return f"iteration {iteration} is a multiple of --exit-interval"
        minutes, limit = (time.monotonic() - self._began) / 60, self._config.exit_duration_in_mins
        signalled, over = self._anywhere(self._signalled, limit is not None and minutes > limit)
        if signalled:
            return SIGNALLED
        return f"--exit-duration-in-mins {limit:g} is over" if over else None

    def signalled(self) -> bool:
        """Whether SIGTERM has reached a rank; every rank calls it after each iteration of an evaluation."""
        (signalled,) = self._anywhere(self._signalled)
        return signalled

    def _anywhere(self, *mine: bool) -> list[bool]:
        """Which of these hold on any rank: a signal may reach only one, and clocks differ."""
        anywhere = torch.tensor(mine, dtype=torch.int32, device=self._device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return [bool(value) for value in anywhere.tolist()]


def is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
