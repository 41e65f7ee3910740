# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core and Megatron-Legacy checkpoints of the `torch` kind: one file per rank in `iter_*/mp_rank_*`.

Both are read by the same code, which detects the dialect. Not here: the files themselves (megatron/).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.ckpt_convert import blocks, lora
from modellink.ckpt_convert.format import Format, OpenRequest, WriteRequest, model_description
from modellink.ckpt_convert.formats import register
from modellink.ckpt_convert.iterations import TRACKER, iteration_folder, iteration_number
from modellink.ckpt_convert.megatron import distributed, model, rank_state, ranks
from modellink.ckpt_convert.megatron.rank_state import Style
from modellink.ckpt_convert.plan import ConversionPlan, PlannedFile
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage import archive
from modellink.ckpt_convert.storage.writing import Planned
from modellink.ckpt_convert.weights import stage_names, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch


class RankFiles(Format):
    """What Megatron-Core and Megatron-Legacy have in common."""

    iterations = True
    sharded = True
    adapters = True

    def plan(self, source: Checkpoint, request: WriteRequest) -> ConversionPlan:
        style = Style(self.name == MegatronLegacy.name, request.dialect, request.moe_grouped_gemm,
                      request.make_vocab_size_divisible_by)
        return plan_megatron(source, request.layout, style, dtype=request.dtype)


@register
class MegatronCore(RankFiles):
    name = "megatron-core"
    title = "Megatron-Core"
    evidence = f"{TRACKER} or iter_* with mp_rank_* (Megatron)"

    def recognize(self, folder: Path) -> bool:
        """A folder with both kinds of files is a run's, whose distributed checkpoint is read."""
        return ranks.is_megatron(folder) and not distributed.is_distributed(folder)

    def open(self, request: OpenRequest) -> Checkpoint:
        described = model_description(request)
        found = model.read(request.folder, described.spec)
        made = Checkpoint(found.kind, request.path, described.spec, described.family, described.companions,
                          found.tensors, found.layout, iteration_number(request.folder),
                          described.prompt_type, copies=found.copies)
        if not found.adapter:
            return made
        if not (found.tensors or request.adapter):
            raise no_model(request.path)
        config = lora.config_of(found.arguments, found.adapter, request.lora_r, request.lora_alpha,
                                request.path)
        if found.tensors:
            return lora.merge_lora(made, config, found.adapter)
        return replace(made, tensors=found.adapter, adapter=config)


@register
class MegatronLegacy(RankFiles):
    name = "megatron-legacy"
    title = "Megatron-Legacy"


def no_model(path: Path) -> ModelLinkError:
    """Return the error about an adapter without the weights of its model."""
    return ModelLinkError("this is a LoRA adapter without its model", where=path,
                          fix="give the base model, and the adapter with --lora-load")


def plan_megatron(source: Checkpoint, layout: ParallelLayout, style: Style, *,
                  dtype: torch.dtype | None = None) -> ConversionPlan:
    """Plan a Megatron checkpoint of the `torch` kind from any source.

    Raises:
        ModelLinkError: the layout does not divide the model, or Megatron-Legacy cannot hold it.
    """
    spec, adapter = source.spec, source.adapter
    known = lora.adapter_weights(spec, source.shapes, source.folder) if adapter else weights(spec)
    if adapter and style.dialect == "modellink-1.0" and spec.multi_head_latent_attention:
        raise ModelLinkError("the original's dialect has no names for adapters of latent attention",
                             where="--dialect", fix="use --dialect megatron-core")
    spec.check_layout(layout)
    iteration = source.iteration or 1  # a model that was never trained has iteration 1, as in the original
    main = dtype or source.main_dtype

    def planned(name: str, rank: int) -> Planned:
        return blocks.shard(source, name, known[name], dtype or source.dtype(name), tp=layout.tp, rank=rank,
                            divisible_by=style.divisible_by)

    def file(stage: int, rank: int, expert_rank: int) -> PlannedFile:
        names = [stage_names(spec, layout, stage, chunk, expert_rank, names=known if adapter else None)
                 for chunk in range(layout.vpp)]
        models = [{lora.on_disk(ours): planned(name, rank) for ours, name in own.items()} for own in names]
        state = rank_state.rank_state(spec, layout, models, style, iteration=iteration, dtype=main,
                                      adapter=adapter)
        name = f"{iteration_folder(iteration)}/{ranks.rank_folder(layout, rank, stage, expert_rank)}/{ranks.FILE}"
        return PlannedFile(name, archive.layout(state))

    files = tuple(file(*position) for position in product(range(layout.pp), range(layout.tp),
                                                          range(layout.ep)))
    form = MegatronLegacy if style.legacy else MegatronCore
    return ConversionPlan(source, form.name, form.title, layout, main, files, iteration=iteration)
