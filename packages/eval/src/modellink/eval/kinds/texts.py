# SPDX-License-Identifier: Apache-2.0
"""The answer is extracted from a generated text; if it is not found, it counts as unparsed and is listed, never guessed."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from modellink.eval.backends.backend import Backend, Completion, GenerationRequest
from modellink.eval.kinds import mathtext
from modellink.eval.prompts import EvalSettings, Question
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark
from modellink.eval.task import Extraction, Generate
from modellink.kernels.errors import ModelLinkError

NAME = "generated text, answer extracted"
TOGETHER = False
SHOWN = 200  # characters shown of a text without an answer


def ask(backend: Backend, questions: Sequence[Question], settings: EvalSettings, sandbox: Sandbox | None,
        ) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, (text,) in write(backend, questions, settings, 1):
        yield number, {"texts": [text.text], "dropped": text.dropped}


def write(backend: Backend, questions: Sequence[Question], settings: EvalSettings,
          samples: int) -> Iterator[tuple[int, list[Completion]]]:
    """Yield the number of each question and its `samples` texts, once all of them are generated.

    Raises:
        ModelLinkError: the backend did not return a text for each request.
    """
    requests = []
    for question in questions:
        assert question.generate is not None
        requests += [
            GenerationRequest(question.context, question.generate.until, question.generate.max_tokens, settings.temperature,
                              settings.top_p, settings.seed + number) for number in range(samples)]
    found: dict[int, dict[int, Completion]] = {number: {} for number in range(len(questions))}
    for place, written in backend.generate(requests):
        number, sample = divmod(place, samples)
        found[number][sample] = written
        if len(found[number]) == samples:
            texts = found.pop(number)
            yield number, [texts[sample] for sample in range(samples)]
    if found:
        raise ModelLinkError(f"{len(found)} of {len(questions)} questions have no answer", where="backend",
                             fix="generate() of the backend must yield a text for each request")


def mark(question: Question, answer: dict[str, Any]) -> Mark:
    generate = question.generate
    assert generate is not None
    text = answer["texts"][0]
    found = {name: extract(extraction, text) for name, extraction in generate.extract.items()}
    target = question.target
    if generate.compare == "math":
        target = target.replace("$", "")
        found = {name: value and mathtext.read(value, target) for name, value in found.items()}
    right = {name: float(value is not None and same(value, target, generate)) for name, value in found.items()}
    first, *others = found
    answered = found[first]
    return Mark(right[first], text.strip()[:SHOWN] if answered is None else answered, question.target,
                unparsed=answered is None, also={name: right[name] for name in others})


def extract(extraction: Extraction, text: str) -> str | None:
    """Return the extracted answer, or None if it is missing or blank."""
    matches = list(re.finditer(extraction.regex, text))
    if not matches:
        return None
    match = matches[0 if extraction.pick == "first" else -1]
    found = next((group for group in match.groups() if group), "") if match.re.groups else match[0]
    return found.strip() or None


def same(answer: str, target: str, generate: Generate) -> bool:
    """Return whether two answers are equal by the rules of a task."""
    answer, target = (_plain(text, generate.ignore, generate.ignore_case) for text in (answer, target))
    return mathtext.same(answer, target) if generate.compare == "math" else answer == target


@functools.lru_cache(maxsize=4096)
def _plain(text: str, ignore: tuple[str, ...], ignore_case: bool) -> str:
    for expression in ignore:
        text = re.sub(expression, "", text)
    return text.lower() if ignore_case else text
