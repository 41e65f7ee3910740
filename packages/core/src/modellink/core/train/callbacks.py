# SPDX-License-Identifier: Apache-2.0
"""Functions of the caller that run during training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modellink.core.train.history import Step
    from modellink.core.train.training import Training


class Callback:
    """Base class of callbacks: every rank calls every method, in the order in which the callbacks were given.

    A method may use collectives, as all ranks call it after the same iterations. An exception ends the run.
    """

    def on_start(self, training: Training) -> None:
        """Before the first iteration; models, optimizer and progress are loaded."""

    def on_step(self, training: Training, step: Step) -> None:
        """After each iteration."""

    def on_evaluation(self, training: Training, where: str, metrics: dict[str, float]) -> None:
        """After an evaluation.

        Args:
            where: as in the log, e.g. "iteration 100 on test set".
            metrics: means over the evaluated samples, by name.
        """

    def on_save(self, training: Training, folder: Path) -> None:
        """After a save has been started in `folder` (with --async-save), or is complete (without)."""

    def on_end(self, training: Training) -> None:
        """After the last iteration, while models and optimizer still exist."""
