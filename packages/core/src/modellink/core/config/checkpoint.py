"""What a run starts from and what it leaves."""

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
    section: ClassVar[str] = "checkpoint"

    load: Path | None = option(None, "Checkpoint to start from: a Hugging Face folder, a Megatron checkpoint, or one that "
                               "training saved, which is then continued. The same empty folder as --save starts anew.")
    auto_resume: bool = option(False, "Continue the run that --save holds, if it holds one, whatever --load says.")
    ckpt_step: int | None = option(None, "Start from this iteration of --load; the last complete one where nothing is said.",
                                   minimum=0)
    ref_load: Path | None = option(None, "Checkpoint of the frozen reference model, for methods that compare with one. "
                                   "Default: --load at the start of the run.")
    finetune: bool = option(False, "Take only the weights of --load: iteration 0, fresh optimizer, data from the start.")
    load_optim: bool = option(True, "Of a run that is continued, take the optimizer's state too.")
    load_rng: bool = option(True, "Of a run that is continued, take the random state too.")
    save: Path | None = option(None, "Folder to save checkpoints in.")
    save_format: SaveFormat = option("torch-dist", "Put the weights beside the state of the run also in the files that the "
                                     "original's programs read.")
    save_interval: int | None = option(None, "Iterations between two saves; the end of the run is always saved.", minimum=1)
    save_total_limit: int | None = option(None, "Keep only so many of the newest checkpoints.", minimum=1)
    async_save: bool = option(False, "Write checkpoints while training goes on; each rank copies its part to host memory first.")
    exit_interval: int | None = option(None, "Stop, saved, when the iteration is a multiple of this.", minimum=1)
    exit_duration_in_mins: float | None = option(None, "Stop, saved, after the first iteration that ends later than this.",
                                                 unit="minutes", minimum=0)

    def check(self) -> None:
        for flag, given in (("--save-interval", self.save_interval), ("--save-total-limit", self.save_total_limit),
                            ("--async-save", self.async_save), ("--auto-resume", self.auto_resume),
                            ("--save-format", self.save_format != "torch-dist")):
            if given and self.save is None:
                raise ModelLinkError("there is no folder to save in", where=flag, fix="give one with --save")
