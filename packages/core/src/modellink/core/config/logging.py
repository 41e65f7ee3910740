# SPDX-License-Identifier: Apache-2.0
"""What a run logs and evaluates."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class LoggingConfig:
    heading: ClassVar[str] = "Logging and evaluation"

    log_interval: int = option(100, "Iterations between log lines.", minimum=1)
    progress: bool = option(True, "Show one progress line instead of log lines if stdout is a terminal.")
    print_arguments: bool = option(False, "Print all settings at the start. They are in SAVE/arguments.txt too.")
    eval_interval: int = option(1000, "Iterations between evaluations on the validation data.", minimum=1)
    eval_iters: int = option(100, "Iterations per evaluation; 0 disables evaluation.", minimum=0)
    skip_train: bool = option(False, "Only evaluate on the validation and test data.")
    log_throughput: bool = option(False, "Log TFLOP/s and tokens/s per rank.")
    peak_tflops: float | None = option(None, "Peak performance of the device, to log the model FLOPs utilization (MFU).",
                                       unit="TFLOP/s", above=0)
    log_num_zeros_in_grad: bool = option(False, "Log the number of zeros in the gradient.")
    tensorboard_dir: Path | None = option(None, "Folder for TensorBoard events.")
    wandb_project: str | None = option(None, "Weights & Biases project to log to; needs modellink-core[wandb].")
    wandb_exp_name: str | None = option(None, "Name of the Weights & Biases run. Default: the last part of --save.")
    wandb_save_dir: Path | None = option(None, "Folder for Weights & Biases files. Default: SAVE/wandb.")
    curve: Path | None = option(None, "SVG file for the loss curve, drawn at each save and at the end. Default: SAVE/loss.svg.")

    def check(self) -> None:
        if self.peak_tflops is not None and not self.log_throughput:
            raise ModelLinkError("--peak-tflops needs --log-throughput", where="--peak-tflops",
                                 fix="add --log-throughput")
        if self.wandb_project is None and (self.wandb_exp_name or self.wandb_save_dir):
            raise ModelLinkError("Weights & Biases needs a project", where="--wandb-exp-name, --wandb-save-dir",
                                 fix="set --wandb-project")
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ModelLinkError("wandb is not installed", where="--wandb-project",
                                 fix='python -m pip install "modellink-core[wandb]"')
