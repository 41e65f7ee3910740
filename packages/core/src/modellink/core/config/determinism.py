# SPDX-License-Identifier: Apache-2.0
"""Reproducible runs, and digests that show where two runs diverge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.options import option


@dataclass(frozen=True)
class DeterminismConfig:
    heading: ClassVar[str] = "Determinism"

    use_deter_comp: bool = option(
        False, "Use deterministic operations and collectives, so that a repeated run is bit-identical; an operation without a "
        "deterministic form ends the run.")
    log_digest: Path | None = option(
        None, "Folder for digests of every rank's loss, gradients and parameters after each iteration; `modellink-train digests "
        "A B` shows where two runs diverge.")
