# SPDX-License-Identifier: Apache-2.0
"""The state of a training run that changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from modellink.kernels.parallel import ParallelLayout


@dataclass
class Training:
    """Models, optimizer and schedule of this rank, and the progress of the run.

    Attributes:
        models: the model chunks of this rank, one per virtual pipeline stage.
        optimizer: megatron-core's optimizer over all chunks.
        schedule: the learning-rate schedule.
        layout: the parallel layout the run has now.
        distributed_optimizer: whether the optimizer state is sharded across data-parallel ranks.
        by_samples: whether schedules count samples instead of iterations.
        method: name of the training method.
        order: settings that determine the order of the data, by name.
        recipe: settings that change what a step computes, by name.
        global_batch_size: in samples, after the ramp-up.
        iteration: finished iterations.
        consumed_samples: samples seen so far by all ranks together.
        ordered: number of samples in each part of the data order; extending a run appends a part.
        reference: frozen model chunks of the reference model; empty if the method needs none.
    """

    models: list[Any]
    optimizer: Any
    schedule: Any
    layout: ParallelLayout
    distributed_optimizer: bool
    by_samples: bool = False
    method: str = "pretrain"
    order: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    global_batch_size: int | None = None
    iteration: int = 0
    consumed_samples: int = 0
    ordered: tuple[int, ...] = ()
    reference: list[Any] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        parameter: torch.nn.Parameter = next(self.models[0].parameters())
        return parameter.device
