# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the answer is the most likely choice after the prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from modellink.eval.backends.backend import Backend, LikelihoodRequest
from modellink.eval.prompts import EvalSettings, Question
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark
from modellink.kernels.errors import ModelLinkError

NAME = "likelihood of choices"
TOGETHER = True


def ask(backend: Backend, questions: Sequence[Question], settings: EvalSettings, sandbox: Sandbox | None,
        ) -> Iterator[tuple[int, dict[str, Any]]]:
    found = iter(backend.loglikelihood([
        LikelihoodRequest(question.context, choice, question.alone) for question in questions for choice in question.choices]))
    for number, question in enumerate(questions):
        mine = [next(found) for _ in question.choices]
        if not all(math.isfinite(one.logprob) for one in mine):
            raise ModelLinkError(f"the likelihoods are {[one.logprob for one in mine]}",
                                 where=f"{question.subject}, row {question.row}",
                                 fix="check the checkpoint for NaN weights, and float16 for overflow")
        yield number, {"logprobs": [one.logprob for one in mine], "greedy": [one.greedy for one in mine],
                       "dropped": max(one.dropped for one in mine)}


def mark(question: Question, answer: dict[str, Any]) -> Mark:
    logprobs = answer["logprobs"]
    chosen = choose(logprobs)
    gold = max(logprobs[index] for index in question.golds)
    others = [value for index, value in enumerate(logprobs) if index not in question.golds]
    return Mark(float(chosen in question.golds), question.choices[chosen].strip(),
                " or ".join(question.choices[index].strip() for index in question.golds),
                margin=gold - max(others) if others else None,
                also={"per character": float(choose(per_character(logprobs, question.choices)) in question.golds)})


def choose(logprobs: Sequence[float]) -> int:
    """Return the index of the most likely choice, the first in a tie."""
    return max(range(len(logprobs)), key=lambda index: logprobs[index])


def per_character(logprobs: Sequence[float], choices: Sequence[str]) -> list[float]:
    """Divide log-probabilities by the lengths of the choices in characters, without the leading space (acc_norm of lm-eval)."""
    return [value / max(1, len(text.strip())) for value, text in zip(logprobs, choices, strict=True)]
