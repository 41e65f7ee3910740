"""What a run tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.options import option


@dataclass(frozen=True)
class LoggingConfig:
    section: ClassVar[str] = "logging"

    log_interval: int = option(100, "Iterations between two log lines.", minimum=1)
    eval_interval: int = option(1000, "Iterations between two evaluations on the validation share.", minimum=1)
    eval_iters: int = option(100, "Iterations of an evaluation; 0 for none.", minimum=0)
    skip_train: bool = option(False, "Only evaluate on the validation and test shares.")
    log_throughput: bool = option(False, "Add the model's TFLOP/s and tokens a second per rank to the log line.")
    peak_tflops: float | None = option(None, "What a device could do, for the share of it that is used (MFU) in the log line.",
                                       unit="TFLOP/s", minimum=0)
    tensorboard_dir: Path | None = option(None, "Folder for TensorBoard events.")
    curve: Path | None = option(None, "SVG picture of the loss, drawn at the end; SAVE/loss.svg where nothing is said.")
