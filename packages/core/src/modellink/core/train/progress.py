# SPDX-License-Identifier: Apache-2.0
"""`training.json`: the progress of a saved run. Its presence marks an iteration's folder as a run that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Whether schedules count samples instead of iterations."""
    ordered: tuple[int, ...] = ()
    """Number of samples in each part of the data order; extending a run appends a part."""
    method: str = "pretrain"
    """Name of the training method."""
    order: dict[str, Any] = field(default_factory=dict)
    """Settings that determine the order of the data, by name."""
    global_batch_size: int | None = None
    """In samples, after the ramp-up; None if unknown."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings that change what a step computes, by name; empty if unknown."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per setting that differs, with its old and its new value; settings that only one side has do not apply there."""
    return [f"{_named(name)} was {before[name]} and is {now[name]}"
            for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]


def _named(name: str) -> str:
    return name if name == "precision" else "--" + name.replace("_", "-")


def write_progress(folder: Path, progress: Progress) -> None:
    write_json(folder / FILE, asdict(progress))


def read_progress(folder: Path) -> Progress | None:
    """The progress of an iteration's folder; None if it holds only weights."""
    if not (folder / FILE).is_file():
        return None
    values = read_json(folder / FILE)
    if "instruction" in values:  # files of version 0.1: whether the run was fine-tuned on instruction data
        values["method"] = "sft" if values.pop("instruction") else "pretrain"
    return Progress(**values | {"ordered": tuple(values.get("ordered", ()))})
