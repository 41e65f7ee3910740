"""Which iterations and ranks are profiled, and what is recorded of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import fields_of, option


@dataclass(frozen=True)
class ProfileConfig:
    section: ClassVar[str] = "profile"

    profile: bool = option(False, "Trace some iterations of some ranks, and print a summary of each.")
    profile_step_start: int = option(10, "Iterations before the first that is traced, of those this start makes; the last "
                                     "of them warms the profiler up.", minimum=0)
    profile_step_end: int = option(12, "The last iteration that is traced.", minimum=1)
    profile_ranks: tuple[int, ...] = option((-1,), "Ranks that are traced; -1: all.", minimum=-1)
    profile_level: Literal["level0", "level1", "level2"] = option(
        "level0", "How much an NPU tells of itself: kernels; also its communication and runtime; also caches and memory.")
    profile_with_cpu: bool = option(False, "Also what the host does, beside an accelerator; on a CPU always.")
    profile_with_stack: bool = option(False, "Also the Python lines that called.")
    profile_with_memory: bool = option(False, "Also what is allocated and freed.")
    profile_record_shapes: bool = option(False, "Also the shapes of inputs.")
    profile_save_path: Path = option(Path("profile_dir"), "Folder for the traces.")

    def check(self) -> None:
        if not self.profile:
            for field in fields_of(type(self)):
                if getattr(self, field.name) != field.default:
                    raise ModelLinkError("nothing is profiled", where=field.flag, fix="add --profile, or leave it out")
        if self.profile_step_end <= self.profile_step_start:
            raise ModelLinkError(f"no iteration is behind the first {self.profile_step_start} and up to {self.profile_step_end}",
                                 where="--profile-step-start, --profile-step-end", fix="let the end be larger than the start")

    def check_ranks(self, world_size: int) -> None:
        """Raise when a rank is to be profiled that there is not."""
        if self.profile and (absent := [rank for rank in self.profile_ranks if rank >= world_size]):
            raise ModelLinkError(f"there is no rank {absent[0]} among {world_size}", where="--profile-ranks",
                                 fix=f"use ranks from 0 to {world_size - 1}, or -1 for all")
