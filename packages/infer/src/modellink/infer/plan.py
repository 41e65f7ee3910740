"""What is settled and checked before a model is built, and before any process starts. Imports no megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from modellink.ckpt_convert import ModelSpec, open_checkpoint
from modellink.ckpt_convert.source import Checkpoint
from modellink.data_prep import Tokenizer
from modellink.infer.template import named_format
from modellink.kernels.device import Device, find
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """A checkpoint and how it is to run."""

    source: Checkpoint
    tokenizer: Tokenizer | None
    layout: ParallelLayout
    device: Device
    dtype: torch.dtype
    prompt_type: str | None = None  # the template around chats; None is the tokenizer's own

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec


def make_plan(path: Path | str, *, layout: ParallelLayout = ParallelLayout(),
              device: Literal["auto", "cpu", "cuda", "npu"] = "auto", index: int = 0,
              dtype: torch.dtype | str | None = None, family: str | None = None, tokenizer: Path | str | None = None,
              prompt_type: str | None = None) -> Plan:
    """Open a checkpoint and check that it can run that way; see `engine.load` for the arguments."""
    source = open_checkpoint(path, family=family, hf=tokenizer)
    check_layout(source.spec, layout)
    folder = Path(tokenizer) if tokenizer else source.companions
    carried = tokenizer is not None or (folder / "tokenizer.json").is_file()
    loaded = Tokenizer.from_folder(folder) if carried else None
    if loaded is not None:
        named_format(loaded, prompt_type)  # what was asked for has to be there; what was recorded, when a chat comes
    return Plan(source, loaded, layout, find(device, index), _dtype(dtype) or source.main_dtype,
                prompt_type or source.prompt_type)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ModelLinkError(f"a model cannot run in {dtype}", where="--dtype", fix=f"use {', '.join(DTYPES)}")
    return found


def check_layout(spec: ModelSpec, layout: ParallelLayout) -> None:
    """Raise unless the layout is one that generation runs at and that fits the model."""
    if layout.cp > 1 or layout.vpp > 1 or layout.dp != layout.ep or (layout.ep > 1 and spec.num_experts is None):
        raise ModelLinkError(f"generation runs at tensor, pipeline and (for mixtures) expert parallel sizes, not at {layout}",
                             where="--tp, --pp, --ep", fix="leave the others at 1, whatever the layout the checkpoint was "
                             "written at")
    spec.check_layout(layout)
    layout.check_layers(spec.num_layers)
