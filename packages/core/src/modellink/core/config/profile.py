# SPDX-License-Identifier: Apache-2.0
"""Which iterations and ranks are profiled, and what is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import fields_of, option


@dataclass(frozen=True)
class ProfileConfig:
    heading: ClassVar[str] = "Profiling"

    profile: bool = option(False, "Trace some iterations of some ranks and print a summary of each.")
    profile_step_start: int = option(
        10, "Iterations of this start to skip before tracing; the last of them warms up the profiler.", minimum=0)
    profile_step_end: int = option(12, "Last iteration to trace.", minimum=1)
    profile_ranks: tuple[int, ...] = option((-1,), "Ranks to trace; -1: all.", minimum=-1)
    profile_level: Literal["level0", "level1", "level2"] = option(
        "level0", "NPU: record kernels (level0), also communication and runtime (level1), also caches and memory (level2).")
    profile_with_cpu: bool = option(False, "Also record host activity; always on for CPU runs.")
    profile_with_stack: bool = option(False, "Also record Python call stacks.")
    profile_with_memory: bool = option(False, "Also record memory allocations.")
    profile_record_shapes: bool = option(False, "Also record input shapes.")
    profile_save_path: Path = option(Path("profile_dir"), "Folder for the traces.")

    def check(self) -> None:
        if not self.profile:
            for field in fields_of(type(self)):
                if getattr(self, field.name) != field.default:
                    raise ModelLinkError(f"{field.flag} needs --profile", where=field.flag, fix="add --profile, or remove it")
        if self.profile_step_end <= self.profile_step_start:
            raise ModelLinkError(f"no iteration lies after {self.profile_step_start} and up to {self.profile_step_end}",
                                 where="--profile-step-start, --profile-step-end", fix="use an end that is larger than the start")

    def check_ranks(self, world_size: int) -> None:
        """Raise ModelLinkError if a rank to profile does not exist."""
        if self.profile and (absent := [rank for rank in self.profile_ranks if rank >= world_size]):
            raise ModelLinkError(f"rank {absent[0]} does not exist: the run has {world_size}", where="--profile-ranks",
                                 fix=f"use ranks from 0 to {world_size - 1}, or -1 for all")
