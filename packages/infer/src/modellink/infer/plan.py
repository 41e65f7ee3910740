"""What is settled and checked before a model is built, and before any process starts. Imports no megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from modellink.ckpt_convert import ModelSpec, open_checkpoint
from modellink.ckpt_convert.source import Checkpoint
from modellink.data_prep import Tokenizer
from modellink.kernels.device import Device, find
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout, divisors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """A checkpoint and how it is to run."""

    source: Checkpoint
    tokenizer: Tokenizer | None
    layout: ParallelLayout
    device: Device
    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec


def make_plan(path: Path | str, *, layout: ParallelLayout = ParallelLayout(),
              device: Literal["auto", "cpu", "cuda", "npu"] = "auto", index: int = 0,
              dtype: torch.dtype | str | None = None, family: str | None = None, tokenizer: Path | str | None = None) -> Plan:
    """Open a checkpoint and check that it can run that way; see `engine.load` for the arguments."""
    source = open_checkpoint(path, family=family, hf=tokenizer)
    check_layout(source.spec, layout)
    folder = Path(tokenizer) if tokenizer else source.companions
    carried = tokenizer is not None or (folder / "tokenizer.json").is_file()
    return Plan(source, Tokenizer.from_folder(folder) if carried else None, layout, find(device, index),
                _dtype(dtype) or source.main_dtype)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ModelLinkError(f"a model cannot run in {dtype}", where="--dtype", fix=f"use {', '.join(DTYPES)}")
    return found


def check_layout(spec: ModelSpec, layout: ParallelLayout) -> None:
    """Raise unless the layout is tensor parallelism alone, at a size that fits the model."""
    if layout.world_size != layout.tp or layout.ep > 1:
        works = [size for size in divisors(spec.groups) if spec.ffn % size == 0]
        raise ModelLinkError(f"generation runs over tensor-parallel ranks alone, not over {layout}",
                             where="--pipeline-model-parallel-size, --tensor-model-parallel-size",
                             fix=f"leave all sizes but --tp at 1; this model can run at --tp {', '.join(map(str, works))}, "
                             "whatever the layout its checkpoint was written at")
    spec.check_layout(layout)
