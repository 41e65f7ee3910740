# SPDX-License-Identifier: Apache-2.0
"""One micro batch of token sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The sequences of one forward pass; all tensors are [micro batch, seq] unless noted.

    Attributes:
        tokens: int64 token ids.
        labels: int64, the token that follows each position.
        loss_mask: fp32, 1 where the label counts towards the loss, 0 elsewhere.
        starts: int64, the position in the sequence at which the document of each token begins. None: attention treats
            each sequence as one document.
        restart: positions count from the start of each document instead of the start of the sequence.
        divisor: scalar by which the summed loss is divided. None: the number of labels that count in this batch.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    starts: Tensor | None = None
    restart: bool = False
    divisor: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def over_global_batch(batches: Sequence[Batch], dp: int, group: Callable[[], dist.ProcessGroup] | None) -> list[Batch]:
    """The micro batches of an iteration with a `divisor` that makes the loss the mean over all labels that count.

    Args:
        batches: those of this rank.
        group: the current data-parallel group, which counts the labels together.
    """
    learned = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
    if group is not None and dp > 1:
        dist.all_reduce(learned, group=group())
    # so that the mean of sum / divisor over micro batches and ranks is the mean over tokens
    divisor = learned.clamp(min=1) / (len(batches) * dp)
    return [replace(batch, divisor=divisor) for batch in batches]
