"""The keys and values of the tokens a batch has seen, in memory that is taken once.

Slot j of a row holds position j. Rows may be of different lengths: prompts stand at the left, what comes after the end of a
shorter one is padding that no token of that row looks at (attention sees positions up to its own) and that is overwritten as
the row grows. Not here: pages, sharing between requests, sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modellink.core.model.state import SequenceState
from modellink.kernels.errors import ModelLinkError


class KeyValueCache:
    """core's `Cache` for the layers of this rank.

    Args:
        layers: global numbers (from 0) of the layers this rank holds.
        slots: the longest a row may become, in tokens.
        batch: number of rows.
        groups, dim: query groups of this rank and the size of a head.
    """

    def __init__(self, layers: range, slots: int, batch: int, groups: int, dim: int, *, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.layers, self.slots = layers, slots
        # Zeros, because a slot that a row has not reached takes part with weight 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(len(layers), slots, batch, groups, dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self._end = 0  # one more than the last slot in use

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def state(self, starts: Sequence[int], count: int, wanted: Tensor | None = None) -> SequenceState:
        """What the model is told for a pass over the next `count` tokens of every row, row i standing at `starts[i]`.

        Raises:
            ModelLinkError: a row would outgrow the cache.
        """
        self._end = max(starts) + count
        if self._end > self.slots:
            raise ModelLinkError(f"a sequence of {self._end} tokens does not fit into a cache of {self.slots}",
                                 fix="make the cache larger or the sequence shorter")
        if not any(starts):
            return SequenceState(length=count, cache=self, wanted=wanted)
        device = self.keys.device
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        self._rows = torch.arange(len(starts), device=device)
        return SequenceState(positions=positions, length=self._end, cache=self, wanted=wanted)

    def update(self, layer_number: int, key: Tensor, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, values = (held[layer_number - 1 - self.layers.start] for held in (self.keys, self.values))
        if positions is None:
            keys[:len(key)], values[:len(key)] = key, value
            return key, value
        index = positions.t()
        keys[index, self._rows], values[index, self._rows] = key, value
        return keys[:self._end], values[:self._end]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(2, index), self.values.index_select(2, index)
