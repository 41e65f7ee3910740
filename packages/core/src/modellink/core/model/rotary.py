"""The rotary angles of a ModelSpec: frequencies with their scaling, and tables of cos and sin by position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """[head dim / 2] angles per position in fp32, as transformers computes them."""
    size = spec.head_dim
    frequencies = 1.0 / spec.rotary_base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    return _stretch_llama3(frequencies, spec) if spec.rope_scaling_type == "llama3" else frequencies


def _stretch_llama3(frequencies: Tensor, spec: ModelSpec) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended (Llama 3.1's published recipe)."""
    assert spec.original_max_position_embeddings
    waves = 2 * math.pi / frequencies
    turns = spec.original_max_position_embeddings / waves  # how often a wave fits into the original length
    keep = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / spec.rope_scaling_factor)


class RotaryTable:
    """cos and sin for positions; grows by doubling when a longer sequence comes."""

    def __init__(self, spec: ModelSpec) -> None:
        self._frequencies = inverse_frequencies(spec)
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
