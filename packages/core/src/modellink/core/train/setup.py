"""The models, optimizer and schedule of a run, filled from what it starts from."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from modellink.core.memory.reuse_fp32 import share
from modellink.core.model.build import BuildSettings, build_models
from modellink.core.model.load import load_weights
from modellink.core.parallel.attention import SequenceCut
from modellink.core.posttrain.adapters import read
from modellink.core.posttrain.lora import add_adapters
from modellink.core.posttrain.quantized import quantize
from modellink.core.run import Run
from modellink.core.train import checkpoint
from modellink.core.train.checkpoint import Training
from modellink.core.train.optimizer import make_optimizer, make_schedule, wrap


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


def set_up(run: Run) -> Training:
    """Build, then take a whole training state where the run goes on, weights alone where it starts from some."""
    first = dist.get_rank() == 0
    if first and (note := run.memory.note(run.layout, run.spec.num_layers)):
        print(note, flush=True)
    settings = build_settings(run)
    models: list[Any] = list(build_models(run.spec, settings))
    if run.source is not None and (run.resumed is None or run.lora.on):
        load_weights(models, run.source, settings, show=first)
        if first and run.resumed is None and run.source.format != "Hugging Face" and not (run.checkpoint.finetune or run.lora.on):
            print(f"note: {run.source.folder} ({run.source.format}) gives its weights; an optimizer state, schedule or random "
                  "state that Megatron left there is not read, and training begins at iteration 0", flush=True)
    if run.lora.on:
        given = {} if run.lora.lora_load is None or run.source is None else read(run.lora.lora_load, run.source,
                                                                                 run.checkpoint.ckpt_step)
        add_adapters(models, run.spec, run.layout, run.lora, run.optimizer.seed, given)
        if run.lora.lora_quantize is not None:
            quantize(models, run.lora.lora_quantize)
    models = list(wrap(models, run.parallel, run.optimizer_instances))
    optimizer = make_optimizer(models, run.optimizer, run.parallel, log_num_zeros_in_grad=run.logging.log_num_zeros_in_grad)
    if run.memory.reuse_fp32_param:
        share(optimizer)
    training = Training(models, optimizer, make_schedule(optimizer, run.optimizer), run.layout,
                        run.parallel.use_distributed_optimizer, run.optimizer.by_samples, run.data.is_instruction_dataset,
                        run.order, run.data.samples_per_iteration(run.layout.dp))
    if run.resumed is not None:
        checkpoint.resume(training, run.resumed, load_optim=run.checkpoint.load_optim,
                          load_rng=run.checkpoint.load_rng)
        if first:
            print(f"continuing from {run.resumed} at iteration {training.iteration}", flush=True)
            if training.iteration >= run.optimizer.train_iters:
                print(f"note: all {run.optimizer.train_iters} iterations are done", flush=True)
    return training
