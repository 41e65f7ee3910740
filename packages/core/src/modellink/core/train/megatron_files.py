# SPDX-License-Identifier: Apache-2.0
"""Weights in the original's Megatron files, next to the state of the run in an iteration's folder.

    SAVE/iter_0000010/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    --save-format megatron-core or megatron-legacy
    SAVE/iter_0000010/{*.distcp, .metadata, ...}                   the checkpoint that the run resumes from

The files are sharded by the run's TP, PP, VPP and EP and hold only weights: the original's programs read them with
--no-load-optim --no-load-rng. They are converted from the checkpoint just saved, spread over the ranks. Not here: their format
(ckpt_convert).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from modellink.ckpt_convert.formats.megatron import plan_megatron
from modellink.ckpt_convert.manifest import Manifest
from modellink.ckpt_convert.megatron import distributed
from modellink.ckpt_convert.megatron.rank_state import Style
from modellink.ckpt_convert.plan import ConversionPlan
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage import writing
from modellink.core.config.checkpoint import SaveFormat
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import atomic_write
from modellink.kernels.parallel import ParallelLayout


def plan(form: SaveFormat, manifest: Manifest, layout: ParallelLayout, divisible_by: int, grouped: bool,
         iteration: Path | None = None) -> ConversionPlan:
    """The conversion plan of an iteration; without its folder only a check that the format can hold the model.

    Raises:
        ModelLinkError: the format has no name for a weight of the model.
    """
    tensors = {} if iteration is None else distributed.read(iteration, manifest.spec)
    number = 1 if iteration is None else int(iteration.name.removeprefix("iter_").removesuffix(".tmp"))
    source = Checkpoint("torch-dist", iteration or Path(), manifest.spec, manifest.family, Path(), tensors, iteration=number)
    cut = ParallelLayout(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep, num_layer_list=layout.num_layer_list)
    style = Style(form == "megatron-legacy", "modellink-1.0", grouped, divisible_by)
    try:
        return plan_megatron(source, cut, style, dtype=getattr(torch, manifest.dtype))
    except ModelLinkError as error:
        raise ModelLinkError(error.what, where=f"--save-format {form}", fix="use --save-format megatron-core") from None


def write(iteration: Path, form: SaveFormat, manifest: Manifest, layout: ParallelLayout, divisible_by: int,
          grouped: bool) -> None:
    """Write the files into an iteration's folder; every rank writes its share."""
    files = plan(form, manifest, layout, divisible_by, grouped, iteration).files
    with ThreadPoolExecutor(1) as pool:
        for file in files[dist.get_rank()::dist.get_world_size()]:
            path = iteration / Path(file.name).relative_to(Path(file.name).parts[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as handle:
                writing.write(handle.fileno(), file.layout, pool, lambda _: None, path)
