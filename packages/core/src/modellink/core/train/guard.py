# SPDX-License-Identifier: Apache-2.0
"""What the training loop needs of high availability: `attempt` a step, `saving` around a save. See resilience/guard.py.

Without high availability `NoGuard` runs everything directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from modellink.core.run import Run
from modellink.core.train.training import Training


class Guard(Protocol):
    def __enter__(self) -> Guard: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None: ...

    def attempt(self, step: Callable[[], None]) -> None:
        """Run a step, again if necessary."""

    def beat(self) -> None:
        """Report that this rank is alive although no step has finished."""

    def saving(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a save; `last`: the run ends after it."""

    def finishing(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the completion of a save that was started earlier."""


class GuardFactory(Protocol):
    def __call__(self, run: Run, training: Training, save: Callable[[Run], None], advance: Callable[[], None]) -> Guard:
        """A guard for this training.

        Args:
            save: writes a checkpoint of the training; every rank of the given run calls it.
            advance: what a step does to the training after the weights have changed.
        """
        ...


class NoGuard:
    """No high availability."""

    def __init__(self, run: Run, training: Training, save: Callable[[Run], None], advance: Callable[[], None]) -> None: ...

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None: ...

    def attempt(self, step: Callable[[], None]) -> None:
        step()

    def beat(self) -> None: ...

    def saving(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    finishing = saving
