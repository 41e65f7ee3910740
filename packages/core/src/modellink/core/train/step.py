# SPDX-License-Identifier: Apache-2.0
"""All micro batches of an iteration through megatron-core's pipeline schedules. The method owns the loss (method.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import tee
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from modellink.core.data.batch import Batch
from modellink.core.model.state import SequenceState
from modellink.core.parallel.context import local_part
from modellink.kernels.errors import InternalError
from modellink.kernels.ops.attention import Documents

if TYPE_CHECKING:
    from modellink.core.train.method import Method

ForwardStep = Callable[[Iterator[Any], Any], tuple[Tensor, Callable[[Tensor], Any]]]


def forward(model: Any, batch: Batch) -> Tensor:
    """Logits [batch, seq / cp, vocabulary / tp] on the last stage, hidden states elsewhere."""
    output: Tensor = model(local_part(batch.tokens), state_of(batch))
    return output


def state_of(batch: Batch) -> SequenceState | None:
    """What attention needs to know about the batch; None if its samples are full sequences."""
    if batch.starts is None:
        return None
    documents = Documents(batch.starts)
    state = SequenceState(documents=documents)
    if batch.restart:
        ends = torch.tensor([0, *documents.ends], device=batch.starts.device)
        lengths = (each := ends.diff()).repeat_interleave(each).view_as(batch.starts)
        positions = torch.arange(batch.starts.size(1), device=batch.starts.device) - batch.starts
        state.positions, state.lengths, state.length = local_part(positions), local_part(lengths), batch.starts.size(1)
    return state


def run_schedule(method: Method, models: Sequence[Any], batches: Callable[[], Iterator[Any]], *, num_microbatches: int,
                 seq_length: int, micro_batch_size: int, forward_only: bool = False) -> dict[str, Tensor]:
    """Run the forward and, unless `forward_only`, the backward pass of an iteration.

    Args:
        batches: makes an iterator over this rank's micro batches; every model chunk reads its own.

    Returns:
        The metrics of the method, by name: means over micro batches and data-parallel ranks, on every rank.
    """
    outputs = _schedule(method.forward_step, models, batches, num_microbatches, seq_length, micro_batch_size,
                        forward_only=forward_only)
    if outputs:
        if (names := outputs[0].keys()) != set(method.metrics):
            raise InternalError(f"the loss of {method.name} reports {sorted(names)}, its metrics are {list(method.metrics)}")
        values = torch.stack([torch.stack([output[name].float() for output in outputs]).mean() for name in method.metrics])
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        values /= parallel_state.get_data_parallel_world_size()
    else:
        values = torch.zeros(len(method.metrics), device=next(models[0].parameters()).device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(),
                       group=parallel_state.get_pipeline_model_parallel_group())
    return dict(zip(method.metrics, values, strict=True))


def forward_outputs(forward_step: ForwardStep, models: Sequence[Any], batches: Callable[[], Iterator[Any]], *,
                    num_microbatches: int, seq_length: int, micro_batch_size: int) -> list[Any]:
    """What the loss function of `forward_step` returns for each micro batch, without gradients, e.g. of a reference model.

    Returns:
        One value per micro batch on ranks of the last pipeline stage; an empty list on other ranks.
    """
    def collect(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        output, compute = forward_step(iterator, model)

        def keep(output: Tensor, non_loss_data: bool = True) -> Any:
            return compute(output)
        return output, keep

    with torch.no_grad():
        outputs: list[Any] = _schedule(collect, models, batches, num_microbatches, seq_length, micro_batch_size,
                                       forward_only=True, collect_non_loss_data=True)
    return outputs


def _schedule(forward_step: ForwardStep, models: Sequence[Any], batches: Callable[[], Iterator[Any]], num_microbatches: int,
              seq_length: int, micro_batch_size: int, **options: bool) -> Any:
    iterators = list(tee(batches(), len(models)))
    several = len(models) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators if several else iterators[0],
        model=list(models) if several else models[0], num_microbatches=num_microbatches, seq_length=seq_length,
        micro_batch_size=micro_batch_size, **options)
