# SPDX-License-Identifier: Apache-2.0
"""What a run starts from and what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.model_options import ModelPathOptions
from modellink.kernels.options import option

SaveFormat = Literal["torch-dist", "megatron-core", "megatron-legacy"]


@dataclass(frozen=True)
class CheckpointConfig(ModelPathOptions):
    heading: ClassVar[str] = "Checkpoints"

    load: Path | None = option(None, "Checkpoint to start from: a Hugging Face folder, a Megatron checkpoint, or a saved run, "
                               "which is resumed. If it is the same empty folder as --save, training starts from scratch.")
    auto_resume: bool = option(False, "Resume the run in --save if it contains one, regardless of --load.")
    ckpt_step: int | None = option(None, "Iteration of --load to start from. Default: the last complete one.",
                                   alias="--iteration", minimum=0)
    ref_load: Path | None = option(None, "Checkpoint of the frozen reference model, for methods that compare with one. "
                                   "Default: --load at the start of the run.")
    finetune: bool = option(False, "Load only the weights of --load, and start at iteration 0.")
    load_optim: bool = option(True, "Resume the optimizer state.")
    load_rng: bool = option(True, "Resume the random state.")
    save: Path | None = option(None, "Folder for checkpoints.")
    save_format: SaveFormat = option("torch-dist", "Also save the weights in the files that the original's programs read.")
    save_interval: int | None = option(None, "Iterations between saves; the end of the run is always saved.", minimum=1)
    save_total_limit: int | None = option(None, "Number of newest checkpoints to keep. Default: all.", minimum=1)
    async_save: bool = option(False, "Write checkpoints in the background, from a copy in host memory.")
    exit_interval: int | None = option(None, "Save and stop when the iteration is a multiple of this.", minimum=1)
    exit_duration_in_mins: float | None = option(None, "Save and stop after the first iteration that ends later than this.",
                                                 unit="minutes", minimum=0)

    def check(self) -> None:
        for flag, given in (("--save-interval", self.save_interval), ("--save-total-limit", self.save_total_limit),
                            ("--async-save", self.async_save), ("--auto-resume", self.auto_resume),
                            ("--save-format", self.save_format != "torch-dist")):
            if given and self.save is None:
                raise ModelLinkError(f"{flag} needs a folder to save in", where=flag, fix="set --save")
