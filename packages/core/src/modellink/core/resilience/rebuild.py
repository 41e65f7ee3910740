"""A training state in host memory, and the same training made anew around it: over other ranks, or over new process groups.

A parameter's fp32 number and its moments are taken where the optimizer has them, in its order; which numbers a rank has depends
on the ranks that share an optimizer (all data-parallel ranks' worth of a half, or one), and these stay as many.
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
    """Of one inner optimizer: steps by group, and by parameter its number and its state."""

    steps: list[int]
    values: list[dict[str, Tensor]]


@dataclass
class Snapshot:
    """All of a rank's training state, on the host."""

    weights: list[dict[str, Tensor]]
    optimized: list[Optimized]
    schedule: dict[str, Any]
    iteration: int
    consumed_samples: int
    ordered: tuple[int, ...]


def optimized(training: Training) -> list[Optimized]:
    """A copy of the optimizer's numbers, on the host."""
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
    """Give the optimizer its numbers again, and the models theirs after it; with `gather` all ranks call it."""
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
    """Put the snapshot into a training that was made anew; all of its ranks call it."""
    with torch.no_grad():
        for model, weights in zip(training.models, snapshot.weights, strict=True):
            for name, parameter in bare(model).named_parameters():
                parameter.copy_(weights[name])
    put_back(training, snapshot.optimized)
    training.schedule.load_state_dict(snapshot.schedule)
    training.iteration, training.consumed_samples = snapshot.iteration, snapshot.consumed_samples
    training.ordered = snapshot.ordered


def rebuild(run: Run, training: Training, snapshot: Snapshot, ranks: list[int], prefix: str, dp: int) -> Run:
    """Make the process groups of `ranks` (of before, in their new order) and in them the training, in place.

    Args:
        prefix: of the keys by which the new groups find each other in the agent's store.
        dp: data-parallel ranks there are then.

    Returns:
        The run as it is then.
    """
    reference = [{name: _host(parameter) for name, parameter in chunk.named_parameters()} for chunk in training.reference]
    let_go(training.models)
    training.models.clear()
    training.reference.clear()
    training.optimizer = training.schedule = None
    gc.collect()
    layout = replace(run.layout, dp=dp)
    instances = run.optimizer_instances if dp == run.layout.dp else 1
    again = replace(run, layout=layout, optimizer_instances=instances, resumed=None, source=run.source if run.lora.on else None)
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
    return replace(again, source=run.source)
