# SPDX-License-Identifier: Apache-2.0
"""What is decided and checked before a model is built and before any process starts. Imports no
megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from modellink.ckpt_convert import ModelSpec, open_checkpoint
from modellink.ckpt_convert.source import Checkpoint
from modellink.data_prep import Tokenizer
from modellink.infer.template import find_format
from modellink.kernels.device import Device, find
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint and how to load it.

    Attributes:
        tokenizer: None if the checkpoint has none.
        prompt_type: the template for chats; None: the tokenizer's own.
    """

    source: Checkpoint
    tokenizer: Tokenizer | None
    layout: ParallelLayout
    device: Device
    dtype: torch.dtype
    prompt_type: str | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec


def make_load_plan(path: Path | str, *, layout: ParallelLayout = ParallelLayout(),
                   device: Literal["auto", "cpu", "cuda", "npu"] = "auto", index: int = 0,
                   dtype: torch.dtype | str | None = None, family: str | None = None,
                   tokenizer: Path | str | None = None, prompt_type: str | None = None,
                   iteration: int | None = None) -> LoadPlan:
    """Open a checkpoint and check that it can run in this way; see `engine.load` for the arguments."""
    source = open_checkpoint(path, family=family, hf=tokenizer, iteration=iteration)
    check_layout(source.spec, layout)
    folder = Path(tokenizer) if tokenizer else source.companions
    has_tokenizer = tokenizer is not None or (folder / "tokenizer.json").is_file()
    loaded = Tokenizer.from_folder(folder) if has_tokenizer else None
    if loaded is not None:
        # check the requested template now, the recorded one only when a chat comes
        find_format(loaded, prompt_type)
    return LoadPlan(source, loaded, layout, find(device, index), _dtype(dtype) or source.main_dtype,
                    prompt_type or source.prompt_type)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ModelLinkError(f"a model cannot run in {dtype}", where="--dtype",
                             fix=f"use {', '.join(DTYPES)}")
    return found


def check_layout(spec: ModelSpec, layout: ParallelLayout) -> None:
    """Raise unless generation supports the layout and it fits the model."""
    if layout.cp > 1 or layout.vpp > 1 or layout.dp != layout.ep or (layout.ep > 1
                                                                     and spec.num_experts is None):
        raise ModelLinkError(f"generation cannot run at {layout}, only at tensor, pipeline and (for mixtures "
                             "of experts) expert parallel sizes", where="--tp, --pp, --ep",
                             fix="keep the other sizes at 1, whatever layout the checkpoint was written at")
    spec.check_layout(layout)
    layout.check_layers(spec.num_layers)
