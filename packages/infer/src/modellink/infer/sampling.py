"""Which token comes next: the most likely one, or one drawn from a distribution that was narrowed first.

The order is the original's: logits / temperature, then top-k, then top-p (which keeps the token that crosses the threshold),
then the draw. Not here: penalties, min-p, beams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.kernels.errors import ModelLinkError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is the same as not sampling.

    `top_k` 0 and `top_p` 1 leave out their filter. `seed` None draws another one each time.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (("temperature", self.temperature, 0, 1e4), ("top-k", self.top_k, 0, math.inf),
                                       ("top-p", self.top_p, 0, 1), ("seed", self.seed or 0, 0, 2**63 - 1)):
            if not low <= value <= high:  # NaN is not
                limit = f"between {low} and {high:g}" if high < math.inf else f"at least {low}"
                raise ModelLinkError(f"{name} is {value}, it must be {limit}", where=f"--{name}")
        if self.top_p == 0:
            raise ModelLinkError("top-p is 0, which keeps no token", where="--top-p", fix="use a number above 0, at most 1")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


def narrow(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [vocabulary] -> the logits to draw from, -inf where a token is out."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what the tokens ahead have together
        logits = logits.index_fill(0, order[before > sampling.top_p], -math.inf)
    return logits


class Chooser:
    """Chooses the tokens of one request; its generator is its own, so that a batch draws what each request draws alone."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [vocabulary] in fp32 -> a token id []."""
        if self.sampling.greedy:
            return logits.argmax()
        return torch.multinomial(narrow(logits, self.sampling).softmax(-1), 1, generator=self.generator)[0]
