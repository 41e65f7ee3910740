# SPDX-License-Identifier: Apache-2.0
"""Boundaries of the documents packed into a sample."""

from __future__ import annotations

import torch
from torch import Tensor


def starts_after(tokens: Tensor, eod: int) -> Tensor:
    """[batch, seq], the position at which the document of each token starts; `eod` tokens end documents."""
    return _starts((tokens == eod).roll(1, dims=1))


def starts_by_number(numbers: Tensor) -> Tensor:
    """The same for documents that are identified by a number at every token, [batch, seq]."""
    return _starts(numbers != numbers.roll(1, dims=1))


def _starts(begins: Tensor) -> Tensor:
    positions = torch.arange(begins.size(1), device=begins.device)
    first = begins & (positions > 0)
    return (first * positions).cummax(dim=1).values
