# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of a layer: tables of cos and sin, and their application to heads."""

from __future__ import annotations

import torch
from torch import Tensor

from modellink.ckpt_convert.layer import RopeSpec
from modellink.core.model.state import SequenceState
from modellink.kernels import ops
from modellink.kernels.ops.rotary import Scaling, inverse_frequencies, yarn_scale


class Rotary:
    """Rotates queries and keys by their positions. Layers with the same `rope` share one object.

    Args:
        rope: None for layers without rotary embedding, whose heads are returned unchanged.
    """

    def __init__(self, rope: RopeSpec | None) -> None:
        self._rope = rope
        self._table = None if rope is None else RotaryTable(rope)
        self.angles: tuple[Tensor, ...] = ()  # of the last pass; they belong to no single layer

    def __call__(self, state: SequenceState, *heads: Tensor) -> list[Tensor]:
        """Rotate heads [seq, batch, heads, dim]; the angles of a pass are looked up once."""
        if self._rope is None or self._table is None:
            return list(heads)
        if self._rope not in state.angles:
            length = state.length
            if length is None:
                length = heads[0].size(0) if state.positions is None else int(state.positions.max()) + 1
            state.angles[self._rope] = self._table(length, state.positions, heads[0].device, heads[0].dtype, state.lengths)
        cos, sin = self.angles = state.angles[self._rope]
        return [ops.rotary(x, cos, sin, interleaved=self._rope.interleaved) for x in heads]


class RotaryTable:
    """cos and sin by position; the table doubles when a longer sequence comes."""

    def __init__(self, rope: RopeSpec) -> None:
        self._rope, self._scaling, self._scale = rope, None, 1.0
        if (scaling := rope.scaling) is not None:
            self._scaling = Scaling(scaling.kind, scaling.factor, scaling.original_length, scaling.low_freq_factor,
                                    scaling.high_freq_factor, scaling.beta_fast, scaling.beta_slow)
            if scaling.kind == "yarn":
                self._scale = (yarn_scale(scaling.factor, scaling.mscale)
                               / yarn_scale(scaling.factor, scaling.mscale_all_dim))
        self._cos = self._sin = torch.empty(0)
        self._made_for = 0
        self._dynamic = rope.scaling is not None and rope.scaling.kind == "dynamic"

    def __call__(self, length: int, positions: Tensor | None, device: torch.device, dtype: torch.dtype,
                 lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [seq, batch or 1, 1, rotated dim].

        Args:
            length: one more than the largest position.
            positions: [batch, seq]. Default: 0 .. length - 1.
            lengths: [batch, seq], the length of the sequence of each token. Default: `length` for all.
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
        """Whether the length of the sequence changes the angles of all its positions (dynamic scaling)."""
        if not self._dynamic or self._scaling is None:
            return False
        return max(length, self._scaling.original_length) != max(self._made_for, self._scaling.original_length)

    def _make(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self._made_for = length
        frequencies = inverse_frequencies(self._rope.dim, self._rope.base, self._scaling, length=length)
        angles = torch.outer(torch.arange(max(length, 2 * len(self._cos)), dtype=torch.float32), frequencies)
        self._cos, self._sin = self._turn(angles, device, dtype)

    def _by_length(self, positions: Tensor, lengths: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin if every token has the angles that belong to the length of its own sequence."""
        distinct, which = lengths.unique(return_inverse=True)
        frequencies = torch.stack([inverse_frequencies(self._rope.dim, self._rope.base, self._scaling, length=length)
                                   for length in distinct.tolist()]).to(positions.device)
        cos, sin = self._turn(positions.t().unsqueeze(-1).float() * frequencies[which.t()], device, dtype)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _turn(self, angles: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every dimension from the angle of every pair."""
        angles = angles.repeat_interleave(2, -1) if self._rope.interleaved else torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self._scale).to(device, dtype), (angles.sin() * self._scale).to(device, dtype)
