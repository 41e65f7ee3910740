"""`training.json`: how far a saved run is; its presence says that an iteration's folder holds a run and not only weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modellink.kernels.files import read_json, write_json

FILE = "training.json"


@dataclass(frozen=True)
class Progress:
    iteration: int
    consumed_samples: int
    layout: str
    distributed_optimizer: bool
    by_samples: bool = False
    """Whether its schedules count samples."""
    ordered: tuple[int, ...] = ()
    """Samples of each part of the order of the data: a run that was made longer has its first order, then another."""
    method: str = "pretrain"
    """Name of the training method."""
    order: dict[str, Any] = field(default_factory=dict)
    """By name, the settings that the order of the data comes from."""
    global_batch_size: int | None = None
    """Past the ramp-up; None: not known."""


def write_progress(folder: Path, progress: Progress) -> None:
    write_json(folder / FILE, asdict(progress))


def read_progress(folder: Path) -> Progress | None:
    """None where the folder holds no training run."""
    if not (folder / FILE).is_file():
        return None
    values = read_json(folder / FILE)
    if "instruction" in values:  # files of version 0.1: whether the run was fine-tuned on instruction data
        values["method"] = "sft" if values.pop("instruction") else "pretrain"
    return Progress(**values | {"ordered": tuple(values.get("ordered", ()))})
