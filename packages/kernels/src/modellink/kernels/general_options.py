# SPDX-License-Identifier: Apache-2.0
"""Options that do not depend on what a command does: `--dry-run`, `--devices` and `--config`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import rank
from modellink.kernels.options import Layer, option, yaml_layer
from modellink.kernels.parallel import ParallelLayout

GENERAL = "General"
NOTHING_DONE = "dry run: nothing was started or written"


@dataclass(frozen=True)
class DryRun:
    """`--dry-run`: validate everything and print what would run; start no process, write no file.

    Attributes:
        devices: number of devices to plan for, over all machines; None if the layout decides.
    """

    heading: ClassVar[str] = GENERAL

    dry_run: bool = option(False, "Validate everything and print what would run; start and write nothing.")
    devices: int | None = option(None, "With --dry-run: number of devices to plan for, over all machines. "
                                       "Default: as many as the layout needs.", minimum=1)

    def check(self) -> None:
        if self.devices is not None and not self.dry_run:
            raise ModelLinkError("--devices applies to --dry-run only", where="--devices", fix="add --dry-run")

    def check_devices(self, layout: ParallelLayout) -> None:
        """Raise ModelLinkError unless --devices is as many as the layout has ranks."""
        if self.devices is not None and self.devices != layout.world_size:
            raise ModelLinkError(f"{layout} has {layout.world_size} ranks, and --devices is {self.devices}",
                                 where="--devices", fix="change the layout or the number of devices")


@dataclass(frozen=True)
class ConfigFileOptions:
    """A file of options."""

    heading: ClassVar[str] = GENERAL

    config: Path | None = option(None, "YAML file of options; the command line overrides it.")


def with_file(given: Layer) -> list[Layer]:
    """Return the layers of a command line with ConfigFileOptions: that of its `--config`, if any, and the rest.

    Raises:
        ModelLinkError: as `yaml_layer`.
    """
    values = dict(given.values)
    path = values.pop("config", None)
    layers = [] if path is None else [yaml_layer(Path(path))]
    return [*layers, Layer(given.source, values)]


def print_plan(rows: Iterable[tuple[str, object]]) -> None:
    """Print what a command would do: a name and a value per line, and that nothing was started or written.

    Under torchrun only the first rank prints.
    """
    if rank() > 0:
        return
    shown = [(name, str(value)) for name, value in rows if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")
    print(NOTHING_DONE, flush=True)
