# SPDX-License-Identifier: Apache-2.0
"""The original's 76 model rows: architecture, layout, batch size and precision, and the original's measured speed.

Each YAML file of this folder is one series: `common` is shared by its presets, `presets` has the values of each. If a
script of the original contradicts the model's public configuration, the preset follows the public one and has a note.

Not here: learning rate, iterations and data, which every run sets itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

import yaml

from modellink.ckpt_convert.families import NO_FORM
from modellink.ckpt_convert.spec import ModelSpec, spec_from
from modellink.core.config import ParallelConfig
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.options import Layer, resolve
from modellink.kernels.parallel import ParallelLayout

SECTIONS = ("model", "parallel", "data", "optimizer")
"""The parts of a preset that are options."""


@dataclass(frozen=True)
class Preset:
    """One row of the original's table.

    Attributes:
        name: `<model>-<size>-<sequence length>`.
        row: position in the table, from 1.
        family: `model_type` of the Hugging Face format; None without one.
        model, parallel, data, optimizer: option values.
        original: how the original ran it: `implementation`, `cluster` (machines x devices), `tokens_per_second` (per device; None
            if it gives none), and further `switches` of its script.
        public: name of the public configuration; None without one, for the reason in `public_missing`.
        notes: differences from the original's script, with reasons.
    """

    name: str
    row: int
    family: str | None
    model: Mapping[str, Any]
    parallel: Mapping[str, Any]
    data: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    original: Mapping[str, Any]
    public: str | None = None
    public_missing: str | None = None
    notes: tuple[str, ...] = ()

    def layer(self) -> Layer:
        """All option values for `resolve`, including the family, which a model from random weights needs."""
        values = {name: value for section in SECTIONS for name, value in getattr(self, section).items()}
        return Layer(f"preset {self.name}", values | {"model_type_hf": self.family or NO_FORM})

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_from(self.model, f"preset {self.name}")

    @property
    def devices(self) -> int:
        """Number of devices in the original's cluster."""
        machines, each = self.original["cluster"].split("x")
        return int(machines) * int(each)

    @cached_property
    def layout(self) -> ParallelLayout:
        """The original's layout; devices that TP, PP and CP do not use are data parallel if they divide the cluster."""
        parallel = resolve([ParallelConfig], Layer(f"preset {self.name}", self.parallel))[ParallelConfig]
        ranks = parallel.model_ranks
        return parallel.layout(self.spec.num_layers, ranks if self.devices % ranks else self.devices)


def preset_names() -> list[str]:
    """Names of all presets, in the order of the original's table."""
    return list(_presets())


def load_preset(name: str) -> Preset:
    """The preset with this name.

    Raises:
        ModelLinkError: it does not exist; similar names are listed.
    """
    known = _presets()
    if name not in known:
        raise ModelLinkError(f"there is no preset {name!r}",
                             fix=near(name.lower(), list(known)) or "see `modellink-train models`")
    return known[name]


@cache
def _presets() -> dict[str, Preset]:
    found = []
    for file in resources.files(__name__).iterdir():
        if file.name.endswith(".yaml"):
            series = yaml.safe_load(file.read_text(encoding="utf-8"))
            found += [_preset(name, series, row) for name, row in series["presets"].items()]
    return {preset.name: preset for preset in sorted(found, key=lambda preset: preset.row)}


def _preset(name: str, series: Mapping[str, Any], row: Mapping[str, Any]) -> Preset:
    common = series.get("common", {})
    sections = {section: row.get(section, {}) | common.get(section, {}) | row.get(section, {}) for section in SECTIONS}
    return Preset(**{"family": series["family"]} | dict(row) | sections | {"name": name, "notes": tuple(row.get("notes", ()))})
