"""What a kind of answer can do, and which one a question has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from modellink.eval.backends.backend import Backend
from modellink.eval.kinds import choices, programs, texts
from modellink.eval.prompts import EvalSettings, Question
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark


class Kind(Protocol):
    """`ask` is what takes time and goes to the journal; `mark` is made anew from the journal whenever results are."""

    NAME: str
    TOGETHER: bool  # whether questions are answered a batch at a time; else all at once are begun, and end one by one

    def ask(self, backend: Backend, questions: Sequence[Question], settings: EvalSettings,
            sandbox: Sandbox | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number of each question and its answer as JSON holds it, with `dropped` tokens of its context, as it is there."""
        ...

    def mark(self, question: Question, answer: dict[str, Any]) -> Mark:
        """What an answer is worth."""
        ...


def kind_of(question: Question) -> Kind:
    if question.generate is None:
        return choices
    return programs if question.generate.test else texts
