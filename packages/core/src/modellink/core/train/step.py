"""One iteration: micro batches through megatron-core's schedule, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from modellink.core.data.pretrain import Batch
from modellink.core.model.state import SequenceState
from modellink.core.parallel.context import local_part
from modellink.kernels import ops
from modellink.kernels.ops.attention import Documents


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """What the schedule calls for each micro batch: the output of this stage, and how the last stage makes a loss of it."""
    batch = next(batches)

    def loss_of(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = ops.cross_entropy(logits, local_part(batch.labels), parallel_state.get_tensor_model_parallel_group(),
                                   overwrite=True)
        divisor = batch.loss_mask.sum().clamp(min=1) if batch.divisor is None else batch.divisor
        loss = (losses * local_part(batch.loss_mask)).sum() / divisor
        whole = loss.detach().clone()  # the schedule divides the loss itself in place
        if parallel_state.get_context_parallel_world_size() > 1:  # each rank has the tokens it holds, of all in the count
            dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return loss, {"loss": whole}

    return model(local_part(batch.tokens), state_of(batch)), loss_of


def state_of(batch: Batch) -> SequenceState | None:
    """What the layers must know of the batch; None where its samples are whole sequences."""
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


def run_schedule(models: Sequence[Any], batches: Callable[[], Iterator[Batch]], *, num_microbatches: int, seq_length: int,
                 micro_batch_size: int, forward_only: bool = False) -> Tensor:
    """All micro batches of an iteration, forward and backward.

    Args:
        batches: makes an iterator over this rank's micro batches; every model chunk reads its own.

    Returns:
        The mean loss over micro batches and data-parallel ranks, in nats a token, on every rank.
    """
    iterators = list(tee(batches(), len(models)))
    several = len(models) > 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators if several else iterators[0],
        model=list(models) if several else models[0], num_microbatches=num_microbatches, seq_length=seq_length,
        micro_batch_size=micro_batch_size, forward_only=forward_only)
    if outputs:
        loss = torch.stack([output["loss"] for output in outputs]).mean()
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        loss /= parallel_state.get_data_parallel_world_size()
    else:
        loss = torch.zeros((), device=next(models[0].parameters()).device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(loss, parallel_state.get_pipeline_model_parallel_last_rank(),
                       group=parallel_state.get_pipeline_model_parallel_group())
    return loss
