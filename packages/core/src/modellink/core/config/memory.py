"""What a run does to hold less: compute twice, keep elsewhere, keep once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout


@dataclass(frozen=True)
class MemoryConfig:
    section: ClassVar[str] = "memory"

    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "Keep only the inputs of whole layers (full), or leave out what is inside attention (selective), and compute it "
        "again in the backward pass.")
    recompute_method: Literal["uniform", "block"] | None = option(
        None, "full: keep the input of every group of layers, or of the first layers of each model chunk one by one.")
    recompute_num_layers: int | None = option(
        None, "uniform: layers of a group; block: how many layers of each model chunk.", minimum=1)
    enable_recompute_layers_per_pp_rank: bool = option(
        False, "block: count the layers of a pipeline stage over all its model chunks.")
    recompute_activation_function: bool = option(
        False, "Compute the output of the feed-forward activation again in layers that are not recomputed in full.")
    recompute_activation_function_num_layers: int | None = option(
        None, "In so many layers of a pipeline stage; all where nothing is said.", minimum=1)
    reuse_fp32_param: bool = option(
        False, "bf16: the weights are the upper halves of the optimizer's fp32 parameters, 4 bytes for both instead of 6.")

    def check(self) -> None:
        full, wrong = self.recompute_granularity == "full", None
        if full and not (self.recompute_method and self.recompute_num_layers):
            wrong = ("full recomputation needs a method and a number of layers", "--recompute-method, --recompute-num-layers",
                     "e.g. --recompute-method block --recompute-num-layers 4")
        elif not full and (self.recompute_method or self.recompute_num_layers):
            wrong = (f"a method and a number of layers belong to full recomputation, not to {self.recompute_granularity}",
                     "--recompute-granularity, --recompute-method, --recompute-num-layers", "use --recompute-granularity full")
        elif self.enable_recompute_layers_per_pp_rank and self.recompute_method != "block":
            wrong = ("layers are counted by stage with the block method alone",
                     "--enable-recompute-layers-per-pp-rank, --recompute-method", "use --recompute-method block")
        elif self.recompute_activation_function and (self.recompute_method == "uniform"
                                                     or self.recompute_granularity == "selective"):
            wrong = ("the activation is recomputed alone or beside the block method",
                     "--recompute-activation-function, --recompute-method, --recompute-granularity", "use one of them")
        elif self.recompute_activation_function_num_layers and not self.recompute_activation_function:
            wrong = ("a number of layers was given, and nothing to recompute in them",
                     "--recompute-activation-function-num-layers", "add --recompute-activation-function")
        if wrong:
            raise ModelLinkError(wrong[0], where=wrong[1], fix=wrong[2])

    def check_layers(self, layout: ParallelLayout, num_layers: int) -> None:
        """Raise when more layers are to be recomputed than there are."""
        if self.enable_recompute_layers_per_pp_rank and layout.vpp == 1:
            raise ModelLinkError("a stage has one model chunk, there is nothing to count together",
                                 where="--enable-recompute-layers-per-pp-rank, --num-layers-per-virtual-pipeline-stage")
        chunks = [len(layout.layers(num_layers, stage, 0)) for stage in range(layout.pp)]
        held = min(chunks) * (layout.vpp if self.enable_recompute_layers_per_pp_rank else 1)
        if (wanted := self.recompute_num_layers or 0) > held:
            raise ModelLinkError(f"{wanted} layers cannot be recomputed where there are {held}",
                                 where="--recompute-num-layers", fix=f"use at most {held}")

    def check_precision(self, dtype: torch.dtype) -> None:
        """Raise when there are no bf16 weights to be halves of anything."""
        if self.reuse_fp32_param and dtype != torch.bfloat16:
            raise ModelLinkError(f"a weight of {str(dtype).removeprefix('torch.')} is not the upper half of an fp32 one",
                                 where="--reuse-fp32-param, --bf16", fix="add --bf16")
