# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm over kernels.ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modellink.kernels import ops


class Norm(nn.Module):
    """RMSNorm or LayerNorm (config.normalization) over the last dimension.

    With sequence parallelism megatron-core sums the gradients over tensor-parallel ranks, which see different tokens.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon, self.offset = eps, 1.0 if config.layernorm_zero_centered_gamma else 0.0
        start = torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros_like(start)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return nn.functional.layer_norm(x, self.weight.shape, self.offset + self.weight, self.bias, self.epsilon)
        if self.offset:  # 1 + weight in fp32: bf16 would round a small weight away
            return ops.rms_norm(x.float(), self.offset + self.weight.float(), self.epsilon).to(x.dtype)
        return ops.rms_norm(x, self.weight, self.epsilon)
