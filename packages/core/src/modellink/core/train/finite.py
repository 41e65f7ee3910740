# SPDX-License-Identifier: Apache-2.0
"""Stops a run before a loss or gradient that is not finite reaches the weights, and keeps the batch that caused it.

Not here: fp16, whose optimizer skips such a step and lowers the loss scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.core.data.batch import Batch
from modellink.kernels.errors import ModelLinkError


class NotFinite(ModelLinkError):
    """A loss or a gradient is not finite; no weight has changed."""


def refuse_not_finite(models: Sequence[Any], loss: Tensor, where: str, leave: Callable[[], str]) -> None:
    """Raise NotFinite on every rank if the loss, or a gradient on any rank, is NaN or infinite.

    Args:
        where: the iteration and its samples, for the message.
        leave: keeps the batch and returns a phrase that says where.
    """
    total = torch.zeros((), device=loss.device)
    for model in models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            total += buffer.grad_data.sum()  # one pass: NaN and infinity survive a sum
    bad = (~torch.isfinite(torch.stack([loss, total]))).int()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    of_loss, of_gradient = bad.tolist()
    if of_loss or of_gradient:
        what = f"the loss is {loss.item()}" if of_loss else "the loss is finite and a gradient is not"
        raise NotFinite(f"{what}; the last checkpoint is unchanged, {leave()}", where=where,
                        fix="inspect these samples and the learning rate; --no-check-for-nan-in-loss-and-grad disables "
                        "this check")


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
