# SPDX-License-Identifier: Apache-2.0
"""One micro batch of token sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
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
