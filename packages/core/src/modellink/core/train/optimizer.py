# SPDX-License-Identifier: Apache-2.0
"""megatron-core's data-parallel wrapper, optimizer and learning-rate schedule for the settings of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from modellink.core.config import OptimizerConfig, ParallelConfig


def wrap(models: Sequence[Any], parallel: ParallelConfig, instances: int = 1) -> list[DistributedDataParallel]:
    """Wrap each model chunk for data parallelism; gradients are reduced in fp32. `instances` as in `processes.join`."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, num_distributed_optimizer_instances=instances,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce, overlap_param_gather=parallel.overlap_param_gather)
    wrapped = [DistributedDataParallel(model.config, settings, model) for model in models]
    for model in wrapped:
        model.broadcast_params()
    return wrapped


@contextlib.contextmanager
def whole_parameters(models: Sequence[Any]) -> Iterator[None]:
    """Within the context every rank has all updated parameters, even with --overlap-param-gather."""
    ahead = [model for model in models if model.ddp_config.overlap_param_gather]
    for model in ahead:
        model.disable_forward_pre_hook(param_sync=True)
    yield
    for model in ahead:
        model.enable_forward_pre_hook()


def make_optimizer(models: Sequence[Any], config: OptimizerConfig, parallel: ParallelConfig, *,
                   log_num_zeros_in_grad: bool = False) -> Any:
    """The (distributed) optimizer over all model chunks, registered in their configs for the pipeline schedules."""
    optimizer = get_megatron_optimizer(MegatronOptimizerConfig(
        optimizer="adam", lr=config.lr, min_lr=config.min_lr, weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2, adam_eps=config.adam_eps, clip_grad=config.clip_grad,
        bf16=config.bf16, fp16=config.fp16, params_dtype=config.dtype, initial_loss_scale=config.initial_loss_scale,
        loss_scale=config.loss_scale, min_loss_scale=config.min_loss_scale, loss_scale_window=config.loss_scale_window,
        hysteresis=config.hysteresis, decoupled_lr=config.decoupled_lr, decoupled_min_lr=config.decoupled_min_lr,
        use_distributed_optimizer=parallel.use_distributed_optimizer, overlap_param_gather=parallel.overlap_param_gather,
        log_num_zeros_in_grad=log_num_zeros_in_grad), list(models))
    no_sync = [model.no_sync for model in models]
    for model in models:
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = optimizer.scale_loss
        if parallel.overlap_grad_reduce:  # gradients are reduced with the last micro batch only
            model.config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
    return optimizer


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The parts of megatron-core's optimizer that hold parameters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def let_go(models: Sequence[Any]) -> None:
    """Break the references between models and optimizer after a run; the models are unusable afterwards.

    Parameters have hooks of the data-parallel wrapper in autograd nodes, which Python's garbage collector does not see; otherwise
    memory, process groups and their threads would never be released.
    """
    for model in models:
        model.config.grad_scale_func = model.config.no_sync_func = model.config.finalize_model_grads_func = None
        model.grad_accs.clear()
        model._modules.clear()


def make_schedule(optimizer: Any, config: OptimizerConfig) -> OptimizerParamScheduler:
    """The learning-rate schedule; `step` advances it by iterations or samples after each iteration."""
    start, end = ((config.weight_decay if value is None else value)
                  for value in (config.start_weight_decay, config.end_weight_decay))
    return OptimizerParamScheduler(
        optimizer, init_lr=config.lr_warmup_init, max_lr=config.lr, min_lr=config.min_lr, lr_warmup_steps=config.warmup,
        lr_decay_steps=config.decay, lr_decay_style=config.lr_decay_style, start_wd=start, end_wd=end,
        wd_incr_steps=config.total, wd_incr_style=config.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=config.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=not config.use_checkpoint_opt_param_scheduler)  # prepare has compared them
