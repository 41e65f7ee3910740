# SPDX-License-Identifier: Apache-2.0
"""Reasons to stop before the last iteration: an interval, a duration or SIGTERM. All ranks stop after the same iteration."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from modellink.core.config import CheckpointConfig


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
        mine = [self._signalled, limit is not None and minutes > limit]
        anywhere = torch.tensor(mine, dtype=torch.int32, device=self._device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)  # a signal may reach one rank, and clocks differ
        signalled, over = anywhere.tolist()
        return "SIGTERM" if signalled else f"--exit-duration-in-mins {limit:g} is over" if over else None


def is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
