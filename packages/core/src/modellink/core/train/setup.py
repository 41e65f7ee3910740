# SPDX-License-Identifier: Apache-2.0
"""Builds the models, optimizer and schedule of a run, and loads what the run starts from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from modellink.core.adapters.lora import add_adapters
from modellink.core.adapters.quantized import quantize
from modellink.core.adapters.saved import read
from modellink.core.memory.apply import save_memory
from modellink.core.memory.reuse_fp32 import share
from modellink.core.model.build import BuildSettings, build_models
from modellink.core.model.load import load_weights
from modellink.core.parallel.attention import SequenceCut
from modellink.core.run import Run
from modellink.core.train import checkpoint
from modellink.core.train.optimizer import make_optimizer, make_schedule, wrap
from modellink.core.train.training import Training
from modellink.kernels.messages import note


def build_settings(run: Run) -> BuildSettings:
    return BuildSettings(
        layout=run.layout, dtype=run.optimizer.dtype, sequence_parallel=run.parallel.sequence_parallel,
        make_vocab_size_divisible_by=run.parallel.make_vocab_size_divisible_by,
        attention_dropout=run.optimizer.attention_dropout, hidden_dropout=run.optimizer.hidden_dropout,
        init_method_std=run.optimizer.init_method_std, moe=run.moe, memory=run.memory,
        use_mc2=run.parallel.use_mc2,
        variable_seq_lengths=run.instruction.variable_seq_lengths,
        sequence_cut=SequenceCut(run.layout.ulysses, run.parallel.use_cp_send_recv_overlap,
                                 run.parallel.kv_head_repeat_before_uly_alltoall))


def set_up(run: Run, *, reference: bool = False) -> Training:
    """Build models, optimizer and schedule, then load a complete training state to resume from, or only weights.

    Args:
        reference: also build the frozen reference model.
    """
    if text := run.memory.note(run.layout, run.spec.num_layers):
        note(text)
    settings = build_settings(run)
    models = _load_models(run, settings)
    frozen = _reference(run, settings, models) if reference else []
    _adapt(run, models)
    models = list(wrap(models, run.parallel, run.optimizer_instances))
    optimizer = make_optimizer(models, run.optimizer, run.parallel, log_num_zeros_in_grad=run.logging.log_num_zeros_in_grad)
    if run.memory.reuse_fp32_param:
        share(optimizer)
    training = Training(
        models, optimizer, make_schedule(optimizer, run.optimizer), run.layout,
        distributed_optimizer=run.parallel.use_distributed_optimizer, by_samples=run.optimizer.by_samples,
        method=run.method, order=run.order, recipe=run.recipe,
        global_batch_size=run.data.samples_per_iteration(run.layout.dp),
        reference=frozen)
    if run.resumed is not None:
        checkpoint.resume(training, run.resumed, load_optim=run.checkpoint.load_optim,
                          load_rng=run.checkpoint.load_rng)
        if _is_first():
            print(f"resuming from {run.resumed} at iteration {training.iteration}", flush=True)
        if training.iteration >= run.optimizer.train_iters:
            note(f"all {run.optimizer.train_iters} iterations are done")
    return training


def _is_first() -> bool:
    return dist.get_rank() == 0


def _load_models(run: Run, settings: BuildSettings) -> list[Any]:
    """The model chunks, with the weights of --load unless a resumed run brings its own."""
    models: list[Any] = list(build_models(run.spec, settings))
    if run.source is None or (run.resumed is not None and not run.lora.on):
        return models
    load_weights(models, run.source, settings, show=_is_first())
    weights_only = run.checkpoint.finetune or run.lora.on
    if run.resumed is None and run.source.format != "Hugging Face" and not weights_only:
        note(f"only weights are loaded from {run.source.folder} ({run.source.format}); optimizer, schedule and random state that "
             "Megatron may have saved there are not read, and training starts at iteration 0")
    return models


@torch.no_grad()
def _reference(run: Run, settings: BuildSettings, models: list[Any]) -> list[Any]:
    """Frozen chunks with the weights of the reference checkpoint, or those of `models`."""
    frozen: list[Any] = list(build_models(run.spec, settings))
    if run.reference is not None:
        load_weights(frozen, run.reference, settings)
    for chunk, model in zip(frozen, models, strict=True):
        if run.reference is None:
            chunk.load_state_dict(model.state_dict())
        chunk.requires_grad_(False)
        chunk.eval()
    return frozen


def _adapt(run: Run, models: list[Any]) -> None:
    """Change the built models in place, in the one order that works: each step sees what the one before made.

    Adapters need the loaded weights, quantization leaves out what adapters train, and memory settings wrap the final modules.
    """
    if run.lora.on:
        given = {}
        if run.lora.lora_load is not None and run.source is not None:
            given = read(run.lora.lora_load, run.source, run.checkpoint.ckpt_step)
        add_adapters(models, run.spec, run.layout, run.lora, run.optimizer.seed, given)
    if run.lora.lora_quantize is not None:
        quantize(models, run.lora.lora_quantize)
    save_memory(models, run.memory)
