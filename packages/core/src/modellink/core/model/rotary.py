"""Tables of cos and sin by position for the rotary angles of a ModelSpec."""

from __future__ import annotations

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.ops.rotary import Scaling, inverse_frequencies, yarn_scale


class RotaryTable:
    """cos and sin for positions; grows by doubling when a longer sequence comes."""

    def __init__(self, spec: ModelSpec) -> None:
        if spec.layer_rotary_bases is not None:
            raise ModelLinkError("rotary bases that differ between layers are only converted, not computed",
                                 where="--layer-rotary-bases")
        self._spec, self._scaling, self._scale = spec, None, 1.0
        if spec.rope_scaling_type is not None:
            self._scaling = Scaling(
                spec.rope_scaling_type, spec.rope_scaling_factor, spec.original_max_position_embeddings or 0,
                spec.low_freq_factor, spec.high_freq_factor, spec.rope_scaling_beta_fast, spec.rope_scaling_beta_slow)
        if spec.rope_scaling_type == "yarn":
            self._scale = (yarn_scale(spec.rope_scaling_factor, spec.rope_scaling_mscale)
                           / yarn_scale(spec.rope_scaling_factor, spec.rope_scaling_mscale_all_dim))
        self._cos = self._sin = torch.empty(0)
        self._made_for = 0
        self._dynamic = spec.rope_scaling_type == "dynamic"

    def __call__(self, length: int, positions: Tensor | None, device: torch.device, dtype: torch.dtype,
                 lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [seq, batch or 1, 1, rotated dim].

        Args:
            length: one more than the largest position.
            positions: [batch, seq]; None for 0 .. length - 1.
            lengths: [batch, seq] of each token's sequence; None where `length` is that of all.
        """
        if lengths is not None and positions is not None and self._dynamic:
            return self._by_length(positions, lengths, device, dtype)
        if len(self._cos) < length or self._cos.device != device or self._cos.dtype != dtype or self._stale(length):
            self._make(length, device, dtype)
        if positions is None:
            return self._cos[:length, None, None], self._sin[:length, None, None]
        index = positions.t()
        return self._cos[index].unsqueeze(2), self._sin[index].unsqueeze(2)

    def _stale(self, length: int) -> bool:
        """Whether the length of the sequence changes the angles of all its positions."""
        if not self._dynamic or self._scaling is None:
            return False
        return max(length, self._scaling.original_length) != max(self._made_for, self._scaling.original_length)

    def _make(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self._made_for = length
        frequencies = inverse_frequencies(self._spec.rotary_dim, self._spec.rotary_base, self._scaling, length=length)
        angles = torch.outer(torch.arange(max(length, 2 * len(self._cos)), dtype=torch.float32), frequencies)
        self._cos, self._sin = self._turn(angles, device, dtype)

    def _by_length(self, positions: Tensor, lengths: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin where every token has the angles of its own sequence's length."""
        distinct, which = lengths.unique(return_inverse=True)
        size, base = self._spec.rotary_dim, self._spec.rotary_base
        frequencies = torch.stack([inverse_frequencies(size, base, self._scaling, length=length)
                                   for length in distinct.tolist()]).to(positions.device)
        cos, sin = self._turn(positions.t().unsqueeze(-1).float() * frequencies[which.t()], device, dtype)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _turn(self, angles: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of each dimension, from the angles of each pair."""
        angles = angles.repeat_interleave(2, -1) if self._spec.rotary_interleaved else torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self._scale).to(device, dtype), (angles.sin() * self._scale).to(device, dtype)
