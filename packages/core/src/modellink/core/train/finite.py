# SPDX-License-Identifier: Apache-2.0
"""Stops a run before a loss or gradient that is not finite reaches the weights, or weights that are not reach a checkpoint.

The batch that caused the former is kept.

Not here: fp16, whose optimizer skips such a step and lowers the loss scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.ckpt_convert.iterations import complete_iterations, iteration_folder
from modellink.core.data.batch import Batch
from modellink.core.model.load import bare
from modellink.core.train.optimizer import inner_optimizers
from modellink.core.train.training import Training
from modellink.kernels.errors import ModelLinkError


class NotFinite(ModelLinkError):
    """A loss or a gradient is not finite; no weight has changed."""


class BadWeights(ModelLinkError):
    """Weights or optimizer state are not finite, so they are not saved."""


def valid_checkpoint(save: Path | None) -> str:
    """Which checkpoint in the folder of a run is the last complete one, for messages."""
    complete = [] if save is None else complete_iterations(save)
    if save is None or not complete:
        return "no checkpoint has been saved"
    return f"the last valid checkpoint is {save / iteration_folder(complete[-1])}"


@torch.no_grad()
def refuse_bad_weights(training: Training, save: Path) -> None:
    """Raise BadWeights on every rank if a weight or an optimizer state on any rank is NaN or infinite."""
    bad = [~torch.isfinite(torch.stack([value.float() for value in torch.aminmax(tensor)])).all()
           for _, tensor in _state(training)]  # the extremes need no copy of the tensor, and NaN is one of them
    found = torch.stack(bad).any().int() if bad else torch.zeros((), dtype=torch.int32, device=training.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if not found.item():
        return
    mine = [name for name, tensor in _state(training) if not torch.isfinite(tensor).all()]
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, mine)
    first = next((each[0] for each in names if each), "a value that has become finite since")
    raise BadWeights(f"{first} is not finite after iteration {training.iteration}, so nothing is saved; "
                     f"{valid_checkpoint(save)}", where=save,
                     fix="inspect the learning rate and the optimizer settings, and resume from the last valid checkpoint")


def _state(training: Training) -> Iterator[tuple[str, Tensor]]:
    """The trained weights and the optimizer state of this rank, with a name for messages."""
    for model in training.models:
        for name, parameter in bare(model).named_parameters():
            if parameter.requires_grad and parameter.numel():
                yield name, parameter.detach()
    for part in inner_optimizers(training.optimizer):
        for parameter, state in part.optimizer.state.items():
            for name, value in {"the main weights": parameter, **state}.items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    yield name, value.detach()


def refuse_not_finite(models: Sequence[Any], measured: Tensor, where: str, leave: Callable[[], str],
                      save: Path | None = None) -> list[float]:
    """Return the numbers of `measured`; raise NotFinite on every rank if the loss, or a gradient on any rank, is NaN or infinite.

    Args:
        measured: the loss and further metrics.
        where: the iteration and its samples, for the message.
        leave: keeps the batch and returns a phrase that says where.
        save: folder of the checkpoints.
    """
    total = torch.zeros((), device=measured.device)
    for model in models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            total += buffer.grad_data.sum()  # one pass: NaN and infinity survive a sum
    bad = (~torch.isfinite(torch.stack([measured[0], total]))).float()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    of_loss, of_gradient, *numbers = torch.cat([bad, measured]).tolist()
    if of_loss or of_gradient:
        what = f"the loss is {numbers[0]}" if of_loss else "the loss is finite and a gradient is not"
        raise NotFinite(f"{what}; {leave()}; {valid_checkpoint(save)}", where=where,
                        fix="inspect these samples and the learning rate; --no-check-for-nan-in-loss-and-grad disables "
                        "this check")
    return numbers


def keep_batch(folder: Path, batches: Iterable[Batch], count: int) -> str:
    """Write `count` micro batches of each data-parallel rank into `folder`, one [samples, seq] array per tensor of a batch."""
    if all(rank == 0 for rank in (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank(),
                                  parallel_state.get_pipeline_model_parallel_rank())):
        folder.mkdir(parents=True, exist_ok=True)
        taken = list(islice(batches, count))
        tensors = [_tensors(batch) for batch in taken]
        for name in tensors[0]:
            rows = [row for batch in tensors for row in batch[name].cpu().numpy()]
            longest = max(map(len, rows))
            filled = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
            np.save(folder / f"{name}_dp{parallel_state.get_data_parallel_rank()}.npy", filled)
    return f"the batch is in {folder}"


def _tensors(batch: Any) -> dict[str, Tensor]:
    """The [samples, seq] tensors of a batch, which is a mapping or an object with attributes."""
    values = batch if isinstance(batch, Mapping) else getattr(batch, "__dict__", {})
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and value.dim() == 2}
