# SPDX-License-Identifier: Apache-2.0
"""Rules between the options of different concerns. Those of one concern are next to its fields (config/)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modellink.ckpt_convert.families import NO_FORM, family_names, family_of
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.adapters.targets import targets
from modellink.core.config import (
    CheckpointConfig,
    DataConfig,
    InstructionConfig,
    LoraConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
)
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    from modellink.core.run import Run


def check(run: Run) -> None:
    """Raise ModelLinkError if settings of a run do not go together."""
    run.memory.check_layers(run.layout, run.spec.num_layers)
    run.profile.check_ranks(run.layout.world_size)
    run.memory.check_precision(run.optimizer.dtype_name)
    _layout(run.spec, run.layout, run.parallel, run.data, run.optimizer)
    targets(run.spec, run.lora)
    _experts(run.spec, run.moe, run.lora)
    _lengths(run.spec, run.instruction, run.moe)
    if run.resilience.enable_high_availability:
        _resilience(run)
    if run.source is None and run.checkpoint.save is not None:
        _family(run.checkpoint)
    if run.checkpoint.save_format != "torch-dist":
        _save_format(run)


def _layout(spec: ModelSpec, layout: ParallelLayout, parallel: ParallelConfig, data: DataConfig,
            optimizer: OptimizerConfig) -> None:
    data.num_microbatches(layout.dp)
    data.check_rampup(layout.dp, layout.pp if layout.vpp > 1 else 1)
    if data.seq_length > spec.max_position_embeddings:
        raise ModelLinkError(f"sequence length {data.seq_length} exceeds the model's {spec.max_position_embeddings} positions",
                             where="--seq-length",
                             fix="shorten it, or raise --max-position-embeddings to train on longer sequences")
    if parallel.sequence_parallel and data.seq_length % layout.tp:
        raise ModelLinkError(f"sequence length {data.seq_length} is not a multiple of tensor parallel size {layout.tp}",
                             where="--seq-length, --sequence-parallel")
    if layout.cp > 1 and data.seq_length % (2 * layout.cp * (layout.tp if parallel.sequence_parallel else 1)):
        raise ModelLinkError(f"sequence length {data.seq_length} cannot be split into {2 * layout.cp} chunks"
                             + (f" for {layout.tp} tensor-parallel ranks" if parallel.sequence_parallel else ""),
                             where="--seq-length, --context-parallel-size", fix="each rank holds two chunks of a sequence")
    if optimizer.attention_dropout and layout.cp // layout.ulysses > 1:
        raise ModelLinkError("ring attention does not support attention dropout",
                             where="--attention-dropout, --context-parallel-algo",
                             fix="use --context-parallel-algo ulysses_cp_algo, or no attention dropout")
    if spec.num_experts and layout.tp > 1 and not parallel.sequence_parallel:
        raise ModelLinkError(f"experts with tensor parallel size {layout.tp} need sequence parallelism",
                             where="--sequence-parallel", fix="add --sequence-parallel")
    passes = data.num_microbatches(layout.dp)
    if layout.vpp > 1 and passes % layout.pp:
        raise ModelLinkError(f"{passes} micro batches are not a multiple of the {layout.pp} interleaved stages",
                             where="--global-batch-size, --num-layers-per-virtual-pipeline-stage")


def _experts(spec: ModelSpec, moe: MoEConfig, lora: LoraConfig) -> None:
    """Options for experts need a model with experts; grouped products need their full, unquantized weights."""
    adapted = sorted({"linear_fc1", "linear_fc2"} & set(lora.modules))
    for flag, given in (("--moe-grouped-gemm", moe.moe_grouped_gemm),
                        ("--moe-permutation-async-comm", moe.moe_permutation_async_comm)):
        if given and spec.num_experts is None:
            raise ModelLinkError("the model has no experts", where=f"{flag}, --num-experts", fix="remove it")
    if moe.moe_grouped_gemm and lora.lora_quantize is not None:
        raise ModelLinkError(f"{lora.lora_quantize} weights are dequantized expert by expert",
                             where="--moe-grouped-gemm, --lora-quantize", fix="remove --moe-grouped-gemm")
    if moe.moe_grouped_gemm and adapted:
        raise ModelLinkError(f"adapters of {', '.join(adapted)} are computed expert by expert",
                             where="--moe-grouped-gemm, --lora-target-modules", fix="remove --moe-grouped-gemm")


def _lengths(spec: ModelSpec, instruction: InstructionConfig, moe: MoEConfig) -> None:
    if instruction.variable_seq_lengths and spec.num_experts and moe.moe_token_dispatcher_type == "allgather":
        raise ModelLinkError("the allgather dispatcher needs the same number of tokens on every rank, and lengths differ",
                             where="--variable-seq-lengths, --moe-token-dispatcher-type",
                             fix="use --moe-token-dispatcher-type alltoall")


def _family(config: CheckpointConfig) -> None:
    """A model from random weights needs a family, to be converted later."""
    if config.model_type_hf is None:
        raise ModelLinkError("the model family is unknown, so the checkpoints could not be converted to Hugging Face format",
                             where="--model-type-hf",
                             fix=f"use one of {', '.join(family_names())}, or {NO_FORM} for a model without such a format")
    if config.model_type_hf != NO_FORM:
        family_of(config.model_type_hf, "--model-type-hf")


def _resilience(run: Run) -> None:
    """Every part of the training state must be on two ranks, and a step must be able to commit on all ranks or none."""
    layout, where = run.layout, "--enable-high-availability"
    if run.checkpoint.save is None:
        raise ModelLinkError(f"{where} needs a folder to save in", where=where, fix="set --save")
    copies = layout.dp * layout.cp // layout.ep if layout.ep > 1 else layout.dp
    if copies < 2:
        what = "each expert is on" if layout.dp > 1 else "each part of the state is on"
        raise ModelLinkError(f"with {layout} {what} only one rank, and would be lost with it", where=where,
                             fix="start twice as many processes")
    if run.optimizer_instances > 1 and (layout.dp % 2 or copies % 2):
        raise ModelLinkError(f"{min(layout.dp, copies)} data-parallel ranks cannot be split into two halves",
                             where=f"{where}, --use-distributed-optimizer",
                             fix="use an even data parallel size, or the plain optimizer")
    if run.optimizer.fp16:
        raise ModelLinkError("fp16 may skip steps, which cannot be committed on all ranks",
                             where=f"{where}, --fp16", fix="use --bf16")
    if run.memory.reuse_fp32_param:
        raise ModelLinkError("--reuse-fp32-param keeps only one copy of each parameter", where=f"{where}, --reuse-fp32-param",
                             fix="remove one of them")


def _save_format(run: Run) -> None:
    form = run.checkpoint.save_format
    if run.lora.on:
        raise ModelLinkError(f"a LoRA run saves only adapters, and {form} files hold the full model",
                             where="--save-format, --lora-target-modules",
                             fix="remove --save-format, and merge SAVE/iter_N/peft with modellink-convert")
    from modellink.core.train import megatron_files  # imports torch
    megatron_files.plan(form, run.manifest, run.layout, run.parallel.make_vocab_size_divisible_by,
                        run.moe.moe_grouped_gemm)
