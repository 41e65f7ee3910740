# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: how a model is split across ranks, and which checkpoint it comes from.

A command's option class inherits from these, so that flags, YAML keys and help texts are the same in every
command. Not here: how a layout assigns layers and rows to ranks (parallel.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option
from modellink.kernels.parallel import ParallelLayout


@dataclass(frozen=True)
class LayoutOptions:
    """How a model is split across ranks."""

    heading: ClassVar[str] = "Parallelism"

    tensor_model_parallel_size: int = option(1, "Tensor parallel size: ranks that share each weight matrix.",
                                             short="--tp", minimum=1)
    pipeline_model_parallel_size: int = option(1, "Pipeline parallel size: stages that share the layers.",
                                               short="--pp", minimum=1)
    expert_model_parallel_size: int = option(1,
                                             "Expert parallel size: ranks that share the experts of a layer.",
                                             short="--ep", minimum=1)
    num_layer_list: tuple[int, ...] | None = option(
        None, "Number of layers of each pipeline stage, e.g. 4,6,6,4. Default: the same for all stages.")

    def one_model(self) -> ParallelLayout:
        """Return the layout of the ranks that share one copy of the model, experts not split."""
        return ParallelLayout(tp=self.tensor_model_parallel_size, pp=self.pipeline_model_parallel_size,
                              num_layer_list=self.num_layer_list or None)

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the model."""
        return self.one_model().world_size

    def chunks(self, num_layers: int) -> int:
        """Return the number of model chunks (virtual stages) of a pipeline stage."""
        return 1

    def layout(self, num_layers: int | None = None, world_size: int | None = None) -> ParallelLayout:
        """Return the layout of `world_size` processes; ranks that model parallelism does not use are data
        parallel.

        Args:
            num_layers: layers of the model. Default: not known, the layout has no virtual stages.
            world_size: number of processes. Default: as few as this layout needs.

        Raises:
            ModelLinkError: the sizes do not divide the processes, or the layers.
        """
        one, ep = self.one_model(), self.expert_model_parallel_size
        processes = one.world_size * ep if world_size is None else world_size
        dp, rest = divmod(processes, one.world_size)
        if rest:
            raise ModelLinkError(f"{processes} processes are not a multiple of {one.world_size} ({one})",
                                 where="--nproc-per-node",
                                 fix=f"use {one.world_size}, {2 * one.world_size} or another multiple")
        if dp * one.cp % ep:
            raise ModelLinkError(f"expert parallel size {ep} does not divide the {dp * one.cp} data-parallel "
                                 f"ranks",
                                 where="--expert-model-parallel-size",
                                 fix=f"use a divisor of {dp * one.cp}, or more processes")
        return replace(one, vpp=1 if num_layers is None else self.chunks(num_layers), ep=ep, dp=dp)


@dataclass(frozen=True)
class VirtualLayoutOptions(LayoutOptions):
    """A layout whose pipeline stages may hold several model chunks (virtual stages)."""

    heading: ClassVar[str] = "Parallelism"

    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Number of layers of a model chunk, for interleaved pipeline stages of several chunks.",
        minimum=1)

    def chunks(self, num_layers: int) -> int:
        """Return the number of model chunks of a pipeline stage.

        Raises:
            ModelLinkError: the layers cannot be split evenly into such chunks.
        """
        size, stages = self.num_layers_per_virtual_pipeline_stage, self.pipeline_model_parallel_size
        if size is None:
            return 1
        if num_layers % (stages * size):
            raise ModelLinkError(f"{num_layers} layers cannot be split into chunks of {size} layers for "
                                 f"{stages} stages",
                                 where="--num-layers-per-virtual-pipeline-stage",
                                 fix="use a number that divides the layers of a stage")
        return num_layers // (stages * size)


@dataclass(frozen=True)
class ModelPathOptions:
    """What a checkpoint may not say about its model."""

    heading: ClassVar[str] = "Model"

    model_type_hf: str | None = option(None,
                                       "Model family, e.g. qwen2. Default: that of the checkpoint. Required to save a "
                                       "model trained from random weights.")
    tokenizer_name_or_path: Path | None = option(
        None, "Hugging Face folder with config.json and tokenizer, for a checkpoint that has none; also the tokenizer that is "
        "saved with random weights.")


@dataclass(frozen=True, kw_only=True)
class RunModelOptions(LayoutOptions, ModelPathOptions):
    """A checkpoint that is loaded to generate or score text, and where it runs."""

    heading: ClassVar[str] = "Model"

    prompt_type: str | None = option(
        None, "Chat template: a prompt type of modellink-preprocess, or a JSON file. Default: the one the "
              "checkpoint was trained with.")
    device: Literal["auto", "cpu", "cuda", "npu"] = option("auto", "Device to run on.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Data type of weights and activations. Default: the checkpoint's.")
