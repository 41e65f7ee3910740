"""Whether a run gives the same bits again, and what shows where two runs part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.options import option


@dataclass(frozen=True)
class DeterminismConfig:
    section: ClassVar[str] = "determinism"

    use_deter_comp: bool = option(
        False, "Take deterministic forms of all operations and collectives, so that the same run gives the same bits; one that "
        "has none ends the run.")
    log_digest: Path | None = option(
        None, "Folder for a digest of every rank's loss, gradients and parameters after each iteration; `modellink-train "
        "digests A B` names where two runs part.")
