"""The norm in a transformer layer, over kernels.ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modellink.kernels import ops


class Norm(nn.Module):
    """RMSNorm; with sequence parallelism its gradient is summed over tensor-parallel ranks, which each see other tokens."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.epsilon)
