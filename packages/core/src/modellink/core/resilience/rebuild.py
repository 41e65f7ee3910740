# SPDX-License-Identifier: Apache-2.0
"""A training state in host memory, and the same training rebuilt from it over other ranks or new process groups.

fp32 parameters and moments are copied from the optimizer in its own order; which of them a rank has depends on the
number of ranks that share an optimizer instance, which does not change.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modellink.core import processes
from modellink.core.model.load import bare
from modellink.core.run import Run
from modellink.core.train.optimizer import inner_optimizers, let_go
from modellink.core.train.setup import set_up
from modellink.core.train.training import Training


@dataclass
class Optimized:
    """The state of one inner optimizer: steps by group, and value and moments by parameter."""

    steps: list[int]
    values: list[dict[str, Tensor]]


@dataclass
class Snapshot:
    """The complete training state of a rank in host memory."""

    weights: list[dict[str, Tensor]]
    optimized: list[Optimized]
    schedule: dict[str, Any]
    iteration: int
    consumed_samples: int
    ordered: tuple[int, ...]


def optimized(training: Training) -> list[Optimized]:
    """A copy of the optimizer state in host memory."""
    return [Optimized([group.get("step", 0) for group in part.optimizer.param_groups],
                      [{"": _host(param), **{name: _host(value) for name, value in part.optimizer.state.get(param, {}).items()}}
                       for group in part.optimizer.param_groups for param in group["params"]])
            for part in inner_optimizers(training.optimizer)]


def take(training: Training) -> Snapshot:
    weights = [{name: _host(parameter) for name, parameter in bare(model).named_parameters()} for model in training.models]
    return Snapshot(weights, optimized(training), training.schedule.state_dict(), training.iteration, training.consumed_samples,
                    training.ordered)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def put_back(training: Training, state: list[Optimized], *, gather: bool = True) -> None:
    """Restore optimizer state and then model weights; with `gather`, all ranks call it."""
    for part, values in zip(inner_optimizers(training.optimizer), state, strict=True):
        inner = part.optimizer
        for group, step in zip(inner.param_groups, values.steps, strict=True):
            group["step"] = step
        params = [param for group in inner.param_groups for param in group["params"]]
        for param, value in zip(params, values.values, strict=True):
            param.copy_(value[""])
            inner.state[param] = {name: tensor.to(param.device, copy=True) for name, tensor in value.items() if name}
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
    for model in training.models:
        if gather and model.ddp_config.use_distributed_optimizer:
            model.start_param_sync(force_sync=True)


def fill(training: Training, snapshot: Snapshot) -> None:
    """Restore a snapshot into a rebuilt training; all of its ranks call it."""
    with torch.no_grad():
        for model, weights in zip(training.models, snapshot.weights, strict=True):
            for name, parameter in bare(model).named_parameters():
                parameter.copy_(weights[name])
    put_back(training, snapshot.optimized)
    training.schedule.load_state_dict(snapshot.schedule)
    training.iteration, training.consumed_samples = snapshot.iteration, snapshot.consumed_samples
    training.ordered = snapshot.ordered


def rebuild(run: Run, training: Training, snapshot: Snapshot, ranks: list[int], prefix: str, dp: int) -> Run:
    """Create the process groups of `ranks` (old numbers, in their new order) and rebuild the training in them, in place.

    Args:
        prefix: of the keys in the agent's store for the new groups.
        dp: the new data parallel size.

    Returns:
        The run with its new layout.
    """
    reference = [{name: _host(parameter) for name, parameter in chunk.named_parameters()} for chunk in training.reference]
    let_go(training.models)
    training.models.clear()
    training.reference.clear()
    training.optimizer = training.schedule = None
    gc.collect()
    layout = replace(run.layout, dp=dp)
    instances = run.optimizer_instances if dp == run.layout.dp else 1
    again = replace(run, layout=layout, optimizer_instances=instances, resumed=None, reference=None,
                    source=run.source if run.lora.on else None)
    processes.rejoin(run.device, layout, ranks, prefix, instances, run.parallel.distributed_timeout_minutes)
    made = set_up(again, reference=bool(reference))
    training.models.extend(made.models)
    training.reference.extend(made.reference)
    with torch.no_grad():
        for chunk, weights in zip(training.reference, reference, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(weights[name])
    training.optimizer, training.schedule = made.optimizer, made.schedule
    training.layout = layout
    fill(training, snapshot)
    return replace(again, source=run.source, reference=run.reference)
