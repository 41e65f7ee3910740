"""From rows to questions: the text before an answer, and the answers it may have.

Templates run in jinja2's immutable sandbox; a row's text is a value in them and never a template. Not here: chat templates.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modellink.eval.backends.backend import Request
from modellink.eval.data import Row, Subject
from modellink.eval.task import Style, Task
from modellink.kernels.errors import ModelLinkError


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        row: its number in the file, from 1.
        head: what all questions of a subject begin with, examples included; the prompt is `head + body`.
        choices: the texts whose likelihoods are compared.
        gold: the index of the right one.
        alone: see `Request.alone`.
    """

    subject: str
    row: int
    head: str
    body: str
    choices: tuple[str, ...]
    gold: int
    alone: bool

    @property
    def prompt(self) -> str:
        return self.head + self.body

    def requests(self) -> list[Request]:
        """One for each choice."""
        return [Request(self.prompt, choice, self.alone) for choice in self.choices]

    def key(self, task: Task) -> str:
        """What its answer is filed under: a digest over everything the answer depends on but the model."""
        parts = [task.name, task.version, self.prompt, self.choices, self.alone]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def make_questions(task: Task, style: Style, subject: Subject) -> Iterator[Question]:
    """The questions of a subject in the order of its file."""
    answers = list(style.choices)
    spoken = {"subject": subject.name.replace("_", " ")}
    head = _render(style.head, spoken, task.name) + "".join(
        _render(style.question, spoken | dict(row.values), task.name) + style.choices[_answer(row)] + style.separator
        for row in subject.examples)
    for row in subject.rows:
        body = _render(style.question, spoken | dict(row.values), task.name)
        yield Question(subject.name, row.number, head, body, tuple(style.choices.values()), answers.index(_answer(row)),
                       style.tokens == "alone")


def _answer(row: Row) -> Any:
    return row.values["answer"]


def _render(template: str, values: Mapping[str, Any], where: str) -> str:
    try:
        return _compiled(template).render(values)
    except jinja2.TemplateError as error:
        raise ModelLinkError(f"a template does not work: {error}", where=f"{where}: {template!r}") from None


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)
