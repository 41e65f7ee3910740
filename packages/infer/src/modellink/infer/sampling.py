# SPDX-License-Identifier: Apache-2.0
"""Parameters of sampling and beam search, with their limits.

Imports no torch, so that a command can check them first; sampler.py and beam.py apply them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modellink.kernels.errors import ModelLinkError

MIN_TEMPERATURE = 1e-5  # below, the most likely token is taken: dividing the logits by less could overflow
LIMITS = {"temperature": (0, 1e4), "top_k": (0, math.inf), "top_p": (0, 1), "seed": (0, 2**63 - 1),
          "min_p": (0, 1), "repetition_penalty": (0.01, 100), "presence_penalty": (-100, 100),
          "frequency_penalty": (-100, 100)}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A temperature of 0 is the same as no sampling; penalties apply in both
    cases.

    `top_k` 0, `top_p` 1 and `min_p` 0 turn their filter off. `seed` None uses a different seed each time.

    Attributes:
        min_p: drop tokens with less than this fraction of the most likely token's probability.
        repetition_penalty: divide the logit of every token in the prompt and completion by this if it is
            positive, else multiply it (Keskar et al. 2019, as in transformers).
        presence_penalty: subtract this from the logit of every token in the completion.
        frequency_penalty: subtract this times the number of occurrences in the completion.

    Raises:
        ModelLinkError: a value is out of range.
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
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is not within any limits
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high:g}"
                raise out_of_range(name, value, limits)
        if self.top_p == 0:
            raise out_of_range("top_p", 0, "greater than 0, at most 1")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class BeamSearch:
    """Beam search with `beams` hypotheses that returns the best `count`.

    Raises:
        ModelLinkError: a value is out of range.
    """

    beams: int
    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise out_of_range("num_beams", self.beams, "at least 1")
        if self.count > self.beams:
            raise ModelLinkError(f"{self.beams} beams cannot return {self.count} completions",
                                 where="--num-return-sequences", fix=f"use at most {self.beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ModelLinkError(f"early_stopping is {self.early_stopping!r}, it must be True, False or "
                                 "'never'",
                                 where="early_stopping")
        if not math.isfinite(self.length_penalty):
            raise out_of_range("length_penalty", self.length_penalty, "finite")


def out_of_range(option: str, value: object, limits: str) -> ModelLinkError:
    """Return the error for an option whose value is outside `limits`; its text does not name the option,
    `where` does."""
    return ModelLinkError(f"{value} is out of range, it must be {limits}",
                          where="--" + option.replace("_", "-"))
