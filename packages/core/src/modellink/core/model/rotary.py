"""Tables of cos and sin by position for the rotary angles of a ModelSpec."""

from __future__ import annotations

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.ops.rotary import inverse_frequencies


class RotaryTable:
    """cos and sin for positions; grows by doubling when a longer sequence comes."""

    def __init__(self, spec: ModelSpec) -> None:
        self._frequencies = inverse_frequencies(
            spec.head_dim, spec.rotary_base, scaling=spec.rope_scaling_type, factor=spec.rope_scaling_factor,
            low_freq_factor=spec.low_freq_factor, high_freq_factor=spec.high_freq_factor,
            original_length=spec.original_max_position_embeddings)
        self._cos = self._sin = torch.empty(0)

    def __call__(self, length: int, positions: Tensor | None, device: torch.device, dtype: torch.dtype,
                 ) -> tuple[Tensor, Tensor]:
        """cos and sin [seq, batch or 1, 1, head dim].

        Args:
            length: one more than the largest position.
            positions: [batch, seq]; None for 0 .. length - 1.
        """
        if len(self._cos) < length or self._cos.device != device or self._cos.dtype != dtype:
            size = max(length, 2 * len(self._cos))
            angles = torch.outer(torch.arange(size, dtype=torch.float32), self._frequencies)
            angles = torch.cat([angles, angles], dim=-1)
            self._cos, self._sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        if positions is None:
            return self._cos[:length, None, None], self._sin[:length, None, None]
        index = positions.t()
        return self._cos[index].unsqueeze(2), self._sin[index].unsqueeze(2)
