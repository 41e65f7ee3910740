# SPDX-License-Identifier: Apache-2.0
"""Chooses the next token from logits.

Order, as in the original: penalties, grammar mask, logits / temperature, top-k, top-p (which keeps the token
that crosses the threshold), min-p, draw. Not here: beam search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modellink.infer.constraint import Constraint
from modellink.infer.sampling import Sampling


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits [vocabulary] divided by the temperature, with -inf for tokens that a filter drops."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # total probability of the more likely tokens
        logits = logits.index_fill(0, order[before > sampling.top_p], -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(sampling.min_p), -math.inf)
    return logits


def penalize(logits: Tensor, sampling: Sampling, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Return logits [vocabulary] with the penalties applied to tokens that occurred before."""
    generated = torch.tensor([*completion], dtype=torch.long, device=logits.device)
    if (penalty := sampling.repetition_penalty) != 1:
        seen = torch.cat([torch.tensor([*prompt], dtype=torch.long, device=logits.device),
                          generated]).unique()
        values = logits[seen]
        logits = logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
    if len(generated) and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = generated.bincount(minlength=len(logits))
        logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    return logits


class Sampler:
    """Chooses the tokens of one request. It has its own random generator, so the draws do not depend on the
    batch.

    Args:
        prompt: token ids; only the repetition penalty reads them.
        completion: token ids so far; the caller appends to this list.
        constraint: the grammar that the completion must match.
    """

    def __init__(self, sampling: Sampling, device: torch.device, prompt: Sequence[int] = (),
                 completion: Sequence[int] = (), constraint: Constraint | None = None) -> None:
        self.sampling, self.constraint = sampling, constraint
        self._prompt, self._completion = prompt, completion
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether it always chooses the most likely token."""
        return self.sampling.greedy and not self.sampling.has_penalties and self.constraint is None

    def __call__(self, logits: Tensor) -> int:
        """Return a token id for logits [vocabulary] in fp32."""
        if self.sampling.has_penalties:
            logits = penalize(logits, self.sampling, self._prompt, self._completion)
        if self.constraint is not None:
            logits = self.constraint.mask(logits)
        if self.sampling.greedy:
            return int(logits.argmax())
        probabilities = filter_logits(logits, self.sampling).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator)[0])
