# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases: the values of TensorBoard under the same names. WANDB_MODE=offline needs no network.

A resumed run with the same --save continues the same Weights & Biases run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modellink.core.config import LoggingConfig

ID = "wandb.id"


class Tracker:
    """An open Weights & Biases run.

    Args:
        save: folder of the checkpoints, which also stores the id of the run.
        settings: option values to show with the run.
    """

    def __init__(self, config: LoggingConfig, save: Path | None, settings: Mapping[str, Any]) -> None:
        import wandb

        folder = config.wandb_save_dir or (save or Path()) / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        known = save / ID if save else None
        identity = known.read_text("utf-8").strip() if known and known.is_file() else None
        self._run = wandb.init(project=config.wandb_project, name=config.wandb_exp_name or (save.name if save else None),
                               dir=str(folder), config={name: _plain(value) for name, value in settings.items()},
                               id=identity, resume="allow", settings=wandb.Settings(silent=True, console="off"))
        if known is not None and identity is None:
            known.write_text(str(self._run.id), "utf-8")

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
