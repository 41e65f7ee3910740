# SPDX-License-Identifier: Apache-2.0
"""Settles and checks a run; starts nothing and writes nothing.

Everything that needs no tensor is checked without importing torch, so that mistakes show at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.config import CheckpointConfig, DataConfig, LoraConfig, OptimizerConfig, ParallelConfig, ResilienceConfig
from modellink.core.prepare import rules
from modellink.core.prepare.start import Start, architecture, check_resumed, find_start, open_reference, resolve_start
from modellink.core.run import CONFIGS, Run
from modellink.core.train.method import Method, find_method
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, fields_of, resolve


def prepare(method: str | type[Method], layers: Sequence[Layer], world_size: int | None = None, local_rank: int = 0) -> Run:
    """Settle and check a run.

    Args:
        method: the training method, or the name it is registered under.
        layers: option values in rising precedence.
        world_size: number of processes; None if they are still to be started.
        local_rank: which device of this machine the process uses.

    Raises:
        ModelLinkError: any mistake in the settings, the data files or the checkpoint.
    """
    chosen = find_method(method) if isinstance(method, str) else method
    model_layers, other_layers = _by_model(layers)
    own = [] if chosen.options is None else [chosen.options]
    configs = resolve((*CONFIGS.values(), *own), *other_layers).configs
    chosen = chosen.for_data(configs[DataConfig])
    _check_data(chosen, configs[DataConfig])
    given = configs[CheckpointConfig]
    if given.ref_load is not None and not chosen.needs_reference:
        raise ModelLinkError(f"{chosen.name} uses no reference model", where="--ref-load", fix="remove it")
    configs[CheckpointConfig], configs[LoraConfig] = resolve_start(given, configs[LoraConfig])
    start = find_start(configs[CheckpointConfig], configs[LoraConfig])
    check_resumed(start, chosen.name, configs[CheckpointConfig], configs[ParallelConfig], configs[OptimizerConfig])
    spec = architecture(start.source, model_layers)
    parallel, resilience = configs[ParallelConfig], configs[ResilienceConfig]
    layout = parallel.layout(spec.num_layers, world_size or parallel.processes() * resilience.nodes[1])
    spec.check_layout(layout)
    _complete(configs, chosen, start, spec, layout.dp)
    halves = resilience.enable_high_availability and parallel.use_distributed_optimizer
    from modellink.kernels.device import find  # imports torch
    run = Run(
        method=chosen.name, spec=spec, layout=layout, device=find(parallel.device, local_rank), source=start.source,
        reference=open_reference(given, start, configs[LoraConfig], spec) if chosen.needs_reference else None,
        options=configs[chosen.options] if chosen.options else None, resumed=start.resumed,
        optimizer_instances=2 if halves else 1, **{name: configs[kind] for name, kind in CONFIGS.items()})
    rules.check(run)
    chosen(run).check()
    return run


def _by_model(layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
    """The layers with the options of the architecture alone, and without them."""
    names = {field.name for field in fields_of(ModelSpec)}
    model = [Layer(layer.source, {name: value for name, value in layer.values.items() if name in names}) for layer in layers]
    other = [Layer(layer.source, {name: value for name, value in layer.values.items() if name not in names})
             for layer in layers]
    return model, other


def _check_data(method: type[Method], data: DataConfig) -> None:
    for file in method.data_files(data):
        if not file.is_file():
            raise ModelLinkError(f"{file} is missing", where="--data-path",
                                 fix="give the prefix that modellink-preprocess printed, without .bin or .idx")


def _complete(configs: dict[type, Any], method: type[Method], start: Start, spec: ModelSpec, dp: int) -> None:
    """Fill in the settings that depend on the checkpoint and the layout."""
    data, optimizer = configs[DataConfig], configs[OptimizerConfig]
    done, consumed = 0, 0
    if start.progress is not None:
        done, consumed = start.progress.iteration, start.progress.consumed_samples
        if data.global_batch_size is None:  # a resumed run keeps its own, on fewer ranks too
            data = replace(data, global_batch_size=start.progress.global_batch_size)
        if optimizer.use_checkpoint_opt_param_scheduler:
            optimizer = configs[OptimizerConfig] = optimizer.with_schedule(start.progress.recipe)
    if optimizer.train_samples is not None:
        iterations = data.iterations_of(optimizer.train_samples, dp, done=done, consumed=consumed)
        configs[OptimizerConfig] = replace(optimizer, train_iters=iterations)
    companions = start.source.companions if start.source else configs[CheckpointConfig].tokenizer_name_or_path
    configs[DataConfig] = method.complete_data(data, spec, companions)
