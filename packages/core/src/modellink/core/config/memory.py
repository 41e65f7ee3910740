# SPDX-License-Identifier: Apache-2.0
"""Memory savings: recompute activations, offload them to the host, share fp32 and bf16 parameters."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout

SWAPPED = "input_layernorm,self_attention,pre_cross_attn_layernorm"
MODULES = {name: name for name in (*SWAPPED.split(","), "pre_mlp_layernorm", "mlp")} | {
    "input_norm": "input_layernorm", "post_attention_norm": "pre_mlp_layernorm"}
"""Modules of a layer whose activations can be offloaded, by our name and by that in the original's Legacy models."""


@dataclass(frozen=True)
class MemoryConfig:
    heading: ClassVar[str] = "Memory"

    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "Recompute activations in the backward pass: those of full layers, or only those inside attention (selective).")
    recompute_method: Literal["uniform", "block"] | None = option(
        None, "full: store the input of each group of layers (uniform), or recompute the first layers of each model chunk "
        "(block).")
    recompute_num_layers: int | None = option(
        None, "Layers per group (uniform), or recomputed layers per model chunk (block).", minimum=1)
    enable_recompute_layers_per_pp_rank: bool = option(
        False, "block: count --recompute-num-layers per pipeline stage instead of per model chunk.")
    recompute_activation_function: bool = option(
        False, "Recompute the feed-forward activation function in layers that are not recomputed in full.")
    recompute_activation_function_num_layers: int | None = option(
        None, "Number of these layers per pipeline stage. Default: all.", minimum=1)
    swap_attention: bool = option(
        False, "Offload the activations of --swap-modules to host memory and prefetch them in the backward pass. With "
        "--recompute-num-layers and no granularity, also recompute the feed-forward part of that many layers per model chunk.")
    swap_modules: str | None = option(None, f"Comma-separated modules of a layer. Default: {SWAPPED}.")
    reuse_fp32_param: bool = option(
        False, "bf16: store the weights as the upper halves of the fp32 parameters, 4 bytes for both instead of 6.")

    @property
    def swap_module_names(self) -> list[str]:
        """The modules of --swap-modules by our names."""
        return list(dict.fromkeys(MODULES[name] for name in (self.swap_modules or SWAPPED).split(",")))

    @property
    def method_in_full(self) -> str | None:
        """The method if layers are recomputed in full."""
        return self.recompute_method if self.recompute_granularity == "full" else None

    @property
    def feed_forwards_recomputed(self) -> int:
        """Number of layers of which only the feed-forward part is recomputed, counted like --recompute-num-layers."""
        return (self.recompute_num_layers or 0) if self.swap_attention and self.recompute_granularity is None else 0

    def check(self) -> None:
        self._check_swap()
        full, wrong = self.recompute_granularity == "full", None
        if full and not (self.recompute_method and self.recompute_num_layers):
            wrong = ("full recomputation needs --recompute-method and --recompute-num-layers",
                     "--recompute-method, --recompute-num-layers", "e.g. --recompute-method block --recompute-num-layers 4")
        elif not full and (self.recompute_method or self.recompute_num_layers) and not self.feed_forwards_recomputed:
            wrong = ("--recompute-method and --recompute-num-layers apply to full recomputation, not to "
                     f"{self.recompute_granularity}",
                     "--recompute-granularity, --recompute-method, --recompute-num-layers", "use --recompute-granularity full")
        elif self.enable_recompute_layers_per_pp_rank and self.recompute_method != "block":
            wrong = ("layers are counted per stage only with the block method",
                     "--enable-recompute-layers-per-pp-rank, --recompute-method", "use --recompute-method block")
        elif self.recompute_activation_function and (self.recompute_method == "uniform"
                                                     or self.recompute_granularity == "selective"):
            wrong = ("the activation function cannot be recomputed together with these options",
                     "--recompute-activation-function, --recompute-method, --recompute-granularity", "use one of them")
        elif self.recompute_activation_function_num_layers and not self.recompute_activation_function:
            wrong = ("--recompute-activation-function-num-layers needs --recompute-activation-function",
                     "--recompute-activation-function-num-layers", "add --recompute-activation-function")
        if wrong:
            raise ModelLinkError(wrong[0], where=wrong[1], fix=wrong[2])

    def _check_swap(self) -> None:
        unknown = [name for name in (self.swap_modules or SWAPPED).split(",") if name not in MODULES]
        if self.swap_modules is not None and not self.swap_attention:
            raise ModelLinkError("--swap-modules needs --swap-attention", where="--swap-modules, --swap-attention",
                                 fix="add --swap-attention")
        if unknown:
            raise ModelLinkError(f"a layer has no module {unknown[0]}", where="--swap-modules",
                                 fix=f"use some of {', '.join(MODULES)}")
        if self.swap_attention and self.recompute_method == "uniform":
            raise ModelLinkError("the uniform method recomputes every layer and leaves nothing to offload",
                                 where="--swap-attention, --recompute-method uniform", fix="use --recompute-method block")
        if self.swap_attention and "mlp" in self.swap_module_names and (
                self.recompute_activation_function or self.feed_forwards_recomputed):
            raise ModelLinkError("the feed-forward part cannot be both recomputed and offloaded",
                                 where="--swap-modules, --recompute-activation-function, --recompute-num-layers",
                                 fix="remove mlp from --swap-modules, or do not recompute it")

    def check_layers(self, layout: ParallelLayout, num_layers: int) -> None:
        """Raise ModelLinkError if the layers of a stage or chunk cannot be recomputed as configured."""
        if self.enable_recompute_layers_per_pp_rank and layout.vpp == 1:
            raise ModelLinkError("--enable-recompute-layers-per-pp-rank needs stages with several model chunks",
                                 where="--enable-recompute-layers-per-pp-rank, --num-layers-per-virtual-pipeline-stage")
        if self.recompute_method == "uniform" and self.recompute_num_layers:
            for held in self._held(layout, num_layers):
                if held % self.recompute_num_layers:
                    raise ModelLinkError(f"groups of {self.recompute_num_layers} layers do not divide a model chunk of {held}",
                                         where="--recompute-num-layers, --recompute-method uniform",
                                         fix=f"use a divisor of {gcd(*self._held(layout, num_layers))}")

    def note(self, layout: ParallelLayout, num_layers: int) -> str | None:
        """A note if more layers are to be recomputed than any stage or chunk has, as in scripts for other layouts."""
        most = max(self._held(layout, num_layers)) * (layout.vpp if self.enable_recompute_layers_per_pp_rank else 1)
        if (wanted := self.recompute_num_layers or 0) <= most:
            return None
        return (f"--recompute-num-layers {wanted} is more than the {most} layers of a "
                f"{'pipeline stage' if self.enable_recompute_layers_per_pp_rank else 'model chunk'}: all of them are recomputed")

    @staticmethod
    def _held(layout: ParallelLayout, num_layers: int) -> set[int]:
        """The numbers of layers of the model chunks."""
        return {len(layout.layers(num_layers, stage, 0)) for stage in range(layout.pp)}

    def check_precision(self, dtype: str) -> None:
        """Raise if the weights are not bfloat16, the upper halves of fp32 numbers."""
        if self.reuse_fp32_param and dtype != "bfloat16":
            raise ModelLinkError(f"a {dtype} weight is not the upper half of an fp32 one",
                                 where="--reuse-fp32-param, --bf16", fix="add --bf16")

    def layers_of_chunk(self, count: int, chunk: int, chunks: int) -> int:
        """How many of `count` layers belong to a model chunk; counted per chunk or over all chunks of a stage."""
        return max(0, -(-(count - chunk) // chunks)) if self.enable_recompute_layers_per_pp_rank else count

    def recomputed_in_full(self, chunk: int, chunks: int) -> int | None:
        """How many of the first layers of a chunk (block) or of each group of layers (uniform) are recomputed in full."""
        if self.recompute_num_layers is None or self.recompute_granularity != "full":
            return None
        return self.layers_of_chunk(self.recompute_num_layers, chunk, chunks)
