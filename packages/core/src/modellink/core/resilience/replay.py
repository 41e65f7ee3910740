# SPDX-License-Identifier: Apache-2.0
"""Undoes a step: a copy of weights and optimizer state in host memory, and digests that detect corruption.

The copy is taken after each step. A digest per tensor, the sum of the bit patterns of its numbers, shows whether
state that must not change before the end of a step has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modellink.core.model.load import bare
from modellink.core.resilience.rebuild import Optimized, optimized, put_back
from modellink.core.train.optimizer import inner_optimizers
from modellink.core.train.training import Training


class LocalCopy:
    """A copy of the state between two steps."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.take()

    def take(self) -> None:
        self._state: list[Optimized] = optimized(self._training)
        self._digests = self._digest()

    def damaged(self) -> bool:
        """Whether the state has changed since."""
        return self._digests != self._digest()

    def put_back(self, *, gather: bool = True) -> None:
        """Restore the copy on all ranks; without `gather` on one rank, whose models then have only its own shard."""
        put_back(self._training, self._state, gather=gather)

    def _digest(self) -> list[int]:
        """Digests of all tensors, with one synchronization with the device."""
        tensors = [value for part in inner_optimizers(self._training.optimizer) for group in part.optimizer.param_groups
                   for param in group["params"] for value in (param, *part.optimizer.state.get(param, {}).values())]
        for model in self._training.models:
            if not model.ddp_config.overlap_param_gather:  # otherwise they change during a step
                tensors += [parameter for parameter in bare(model).parameters() if parameter.requires_grad]
        if not tensors:
            return []
        digests: list[int] = torch.stack([_sum_of_bits(tensor.detach()) for tensor in tensors]).tolist()
        return digests


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).sum(dtype=torch.int64)
