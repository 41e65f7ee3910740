"""A step is undone: the weights and the optimizer's state once more in host memory, and how to see that something changed them.

The copy is taken after each step. A digest a tensor, the sum of its numbers' bit patterns, says whether what a step must leave
alone until its end has been left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modellink.core.model.load import bare
from modellink.core.resilience.rebuild import Optimized, optimized, put_back
from modellink.core.train.optimizer import inner_optimizers
from modellink.core.train.training import Training


class LocalCopy:
    """Of the state between two steps."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.take()

    def take(self) -> None:
        self._state: list[Optimized] = optimized(self._training)
        self._digests = self._digest()

    def damaged(self) -> bool:
        """Whether something has changed since."""
        return self._digests != self._digest()

    def put_back(self, *, gather: bool = True) -> None:
        """All ranks call it, or one alone without `gather`: then its models have the new numbers of its own part alone."""
        put_back(self._training, self._state, gather=gather)

    def _digest(self) -> list[int]:
        """In one trip from the device."""
        tensors = [value for part in inner_optimizers(self._training.optimizer) for group in part.optimizer.param_groups
                   for param in group["params"] for value in (param, *part.optimizer.state.get(param, {}).values())]
        for model in self._training.models:
            if not model.ddp_config.overlap_param_gather:  # else they change while a step goes on
                tensors += [parameter for parameter in bare(model).parameters() if parameter.requires_grad]
        if not tensors:
            return []
        digests: list[int] = torch.stack([_sum_of_bits(tensor.detach()) for tensor in tensors]).tolist()
        return digests


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).sum(dtype=torch.int64)
