"""What a kind of answer can do, and which one a question has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from modellink.eval.backends.backend import Backend
from modellink.eval.kinds import choices, programs, texts
from modellink.eval.prompts import Asking, Question
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark


class Kind(Protocol):
    """`ask` is what takes time and goes to the journal; `mark` is made anew from the journal whenever results are."""

    NAME: str

    def ask(self, backend: Backend, questions: Sequence[Question], asking: Asking,
            sandbox: Sandbox | None) -> list[dict[str, Any]]:
        """The answer to each question as JSON holds it, with `dropped` tokens of its context."""
        ...

    def mark(self, question: Question, answer: dict[str, Any]) -> Mark:
        """What an answer is worth."""
        ...


def kind_of(question: Question) -> Kind:
    if question.generate is None:
        return choices
    return programs if question.generate.test else texts
