# SPDX-License-Identifier: Apache-2.0
"""Keeps a completion within a grammar: before each token, those that would violate it are masked. Not here:
beam search."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from modellink.data_prep import Tokenizer
from modellink.infer.grammar import matcher


class Constraint:
    """The state of a grammar in one completion.

    Args:
        ends: token ids that end the completion, wherever the grammar allows it to end.

    Attributes:
        done: the grammar allows nothing more.
        stuck: the grammar became too complex to follow, or no token can follow.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: str, ends: frozenset[int]) -> None:
        self._matcher = matcher(tokenizer, grammar).deep_copy()
        self._ends, self._other_ends = frozenset(ends), sorted(set(tokenizer.eos_token_ids) - ends)
        self.done = self.stuck = False

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits [vocabulary] with -inf for every token that must not follow; sets `stuck`."""
        size = len(logits)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8),
                             bitorder="little")[:size].astype(bool)
        allowed = np.zeros(size, bool)
        allowed[:len(bits)] = bits
        allowed[_within(self._other_ends, size)] = False
        allowed[_within(self._ends, size)] = self._matcher.is_accepting()
        self.stuck = bool(self._matcher.is_error()) or not allowed.any()
        if self.stuck:
            return logits
        return logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -math.inf)

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen; sets `done`."""
        if token not in self._ends:
            self._matcher.consume_token(token)
            self.done = bool(self._matcher.is_stopped())


def _within(tokens: Iterable[int], size: int) -> list[int]:
    """Return the tokens that the model has logits for; a tokenizer may name end tokens beyond the vocabulary.
    """
    return [token for token in tokens if 0 <= token < size]
