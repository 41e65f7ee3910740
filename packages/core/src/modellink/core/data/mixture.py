"""Several sets in one order: sample by sample the set is chosen whose share of what was drawn is due.

Which sample has which place is arithmetic on the place alone, so that a run goes on anywhere without counting from the beginning:
of the first n places floor(n w) are of a set of weight w, and so on among the places that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Protocol, TypeVar

T = TypeVar("T", covariant=True)


class Samples(Protocol[T]):
    """Samples by number, without end."""

    def __getitem__(self, number: int) -> T: ...


@dataclass(frozen=True)
class Mixture(Samples[T]):
    """Samples of `parts`, in the proportions of `weights` (any positive numbers)."""

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
