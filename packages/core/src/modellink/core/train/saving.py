# SPDX-License-Identifier: Apache-2.0
"""What a run saves next to its state: files in the original's formats, and adapters in PEFT's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from modellink.core.adapters.saved import write_description, write_peft
from modellink.core.run import Run
from modellink.core.train import checkpoint, megatron_files
from modellink.core.train.training import Training
from modellink.core.train.writer import Writer


def save(run: Run, training: Training, folder: Path, writer: Writer) -> None:
    """Save the current iteration in `folder`, in the background if the run asks for it; all ranks call it."""
    checkpoint.save(training, folder, run.manifest, run.companions, tokenizer_alone=run.source is None,
                    extra_files=_additional_files(run, folder), keep=run.checkpoint.save_total_limit,
                    background=writer if run.checkpoint.async_save else None)


def save_now(training: Training, run: Run) -> None:
    """Save in --save and return when the checkpoint is complete; all ranks of `run` call it."""
    assert run.checkpoint.save is not None
    save(replace(run, checkpoint=replace(run.checkpoint, async_save=False)), training, run.checkpoint.save, Writer())


def _additional_files(run: Run, folder: Path) -> Callable[[Path], None] | None:
    """A function that writes further files into the folder of an iteration, if any."""
    form = run.checkpoint.save_format
    if form != "torch-dist":
        return partial(megatron_files.write, form=form, manifest=run.manifest, layout=run.layout,
                       divisible_by=run.parallel.make_vocab_size_divisible_by, grouped=run.moe.moe_grouped_gemm)
    if not run.lora.on or run.checkpoint.load is None or dist.get_rank() > 0:
        return None
    write_description(folder, run.lora)
    return partial(write_peft, manifest=run.manifest, lora=run.lora, base=run.checkpoint.load)
