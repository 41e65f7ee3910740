# SPDX-License-Identifier: Apache-2.0
"""A weighted blend of several data sets in a fixed order.

The sample at a position follows from the position by arithmetic, so that a run can be resumed anywhere: of the first n positions
floor(n w) belong to the first set, of weight w, and so on among the remaining positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Protocol, TypeVar

T = TypeVar("T", covariant=True)


class Samples(Protocol[T]):
    """Samples by number, endlessly."""

    def __getitem__(self, number: int) -> T: ...


@dataclass(frozen=True)
class Mixture(Samples[T]):
    """A blend of `parts` in proportion to `weights` (positive numbers)."""

    parts: Sequence[Samples[T]]
    weights: Sequence[float]

    def __getitem__(self, number: int) -> T:
        left = sum(self.weights)
        for part, weight in zip(self.parts[:-1], self.weights, strict=False):
            taken = floor(number * (weight / left))
            if floor((number + 1) * (weight / left)) > taken:
                return part[taken]
            number, left = number - taken, left - weight
        return self.parts[-1][number]
