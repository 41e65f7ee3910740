"""`training.json`: how far a saved run is; its presence says that an iteration's folder holds a run and not only weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from modellink.kernels.files import read_json, write_json

FILE = "training.json"


@dataclass(frozen=True)
class Progress:
    iteration: int
    consumed_samples: int
    layout: str
    distributed_optimizer: bool


def write_progress(folder: Path, progress: Progress) -> None:
    write_json(folder / FILE, asdict(progress))


def read_progress(folder: Path) -> Progress | None:
    """None where the folder holds no training run."""
    return Progress(**read_json(folder / FILE)) if (folder / FILE).is_file() else None
