"""Which token comes next: the most likely one, or one drawn from a distribution that was narrowed first.

The order is the original's: penalties, what a constraint leaves, logits / temperature, then top-k, then top-p (which keeps the
token that crosses the threshold), then min-p, then the draw. Not here: beams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.infer.constraint import Constraint
from modellink.kernels.errors import ModelLinkError

COLD = 1e-5  # a lower temperature takes the most likely token: what is divided by it may be no number any more


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 (and below COLD) is the same as not sampling; penalties work in both cases.

    `top_k` 0, `top_p` 1 and `min_p` 0 leave out their filter. `seed` None draws another one each time.

    Attributes:
        min_p: a token stays when its probability is at least this share of the most likely one's.
        repetition_penalty: the logit of every token of prompt and answer is divided by it where positive, else multiplied
            (Keskar et al. 2019, as in transformers).
        presence_penalty: taken from the logit of every token that the answer holds already.
        frequency_penalty: the same, times how often it does.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, value, low, high in (
                ("temperature", self.temperature, 0, 1e4), ("top-k", self.top_k, 0, math.inf), ("top-p", self.top_p, 0, 1),
                ("seed", self.seed or 0, 0, 2**63 - 1), ("min-p", self.min_p, 0, 1),
                ("repetition-penalty", self.repetition_penalty, 0.01, 100),
                ("presence-penalty", self.presence_penalty, -100, 100),
                ("frequency-penalty", self.frequency_penalty, -100, 100)):
            if not low <= value <= high:  # NaN is not
                limit = f"between {low} and {high:g}" if high < math.inf else f"at least {low}"
                raise ModelLinkError(f"{name} is {value}, it must be {limit}", where=f"--{name}")
        if self.top_p == 0:
            raise ModelLinkError("top-p is 0, which keeps no token", where="--top-p", fix="use a number above 0, at most 1")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < COLD

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


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
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(sampling.min_p), -math.inf)
    return logits


def penalise(logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [vocabulary] with the penalties on what was said already."""
    said = torch.tensor([*answer], dtype=torch.long, device=logits.device)
    if (penalty := sampling.repetition_penalty) != 1:
        seen = torch.cat([torch.tensor([*prompt], dtype=torch.long, device=logits.device), said]).unique()
        values = logits[seen]
        logits = logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
    if len(said) and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = said.bincount(minlength=len(logits))
        logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    return logits


class Chooser:
    """Chooses the tokens of one request; its generator is its own, so that a batch draws what each request draws alone.

    Args:
        prompt: its tokens, which only the repetition penalty looks at.
        answer: its tokens so far; the list that grows.
        constraint: what the answer keeps to.
    """

    def __init__(self, sampling: Sampling, device: torch.device, prompt: Sequence[int] = (), answer: Sequence[int] = (),
                 constraint: Constraint | None = None) -> None:
        self.sampling, self._prompt, self._answer, self.constraint = sampling, prompt, answer, constraint
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the most likely token is what it chooses."""
        return self.sampling.greedy and not self.sampling.penalised and self.constraint is None

    def __call__(self, logits: Tensor) -> int:
        """Logits [vocabulary] in fp32 -> a token id."""
        if self.sampling.penalised:
            logits = penalise(logits, self.sampling, self._prompt, self._answer)
        if self.constraint is not None:
            logits = self.constraint.narrow(logits)
        if self.sampling.greedy:
            return int(logits.argmax())
        return int(torch.multinomial(narrow(logits, self.sampling).softmax(-1), 1, generator=self._generator)[0])
