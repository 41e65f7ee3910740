"""What a run tells."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.errors import ModelLinkError
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
    log_num_zeros_in_grad: bool = option(False, "Count the zeros of the gradient, for the log line.")
    tensorboard_dir: Path | None = option(None, "Folder for TensorBoard events.")
    wandb_project: str | None = option(None, "Project of Weights & Biases to tell the same to; needs the extra [wandb].")
    wandb_exp_name: str | None = option(None, "Name of the run there; the last part of --save where nothing is said.")
    wandb_save_dir: Path | None = option(None, "Folder for its files; SAVE/wandb where nothing is said.")
    curve: Path | None = option(None, "SVG picture of the loss, drawn at the end; SAVE/loss.svg where nothing is said.")

    def check(self) -> None:
        if self.peak_tflops is not None and not self.log_throughput:
            raise ModelLinkError("no throughput is shown that could be a share of it", where="--peak-tflops",
                                 fix="add --log-throughput")
        if self.wandb_project is None and (self.wandb_exp_name or self.wandb_save_dir):
            raise ModelLinkError("there is no project", where="--wandb-exp-name, --wandb-save-dir", fix="give --wandb-project")
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ModelLinkError("wandb is not installed", where="--wandb-project",
                                 fix='python -m pip install "modellink-core[wandb]", or leave it out')
