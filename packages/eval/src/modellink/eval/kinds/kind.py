# SPDX-License-Identifier: Apache-2.0
"""The interface of a kind of answer, and the kind of a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from modellink.eval.backends.backend import Backend
from modellink.eval.kinds import choices, programs, texts
from modellink.eval.prompts import EvalSettings, Question
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark


class Kind(Protocol):
    """`ask` computes answers, which are recorded in the journal; `mark` scores them and is repeated for every report."""

    NAME: str
    TOGETHER: bool  # whether questions are answered in batches; otherwise all are started together and finish one by one

    def ask(self, backend: Backend, questions: Sequence[Question], settings: EvalSettings,
            sandbox: Sandbox | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each question and its answer, a JSON value with the `dropped` tokens of its context."""
        ...

    def mark(self, question: Question, answer: dict[str, Any]) -> Mark:
        """Mark an answer."""
        ...


def kind_of(question: Question) -> Kind:
    if question.generate is None:
        return choices
    return programs if question.generate.test else texts
