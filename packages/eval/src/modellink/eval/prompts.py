# SPDX-License-Identifier: Apache-2.0
"""Make questions from rows: the prompt, the choices and the right answer.

Templates run in jinja2's immutable sandbox; the text of a row is a value and never a template. Chat templates are applied later,
by data-prep, when a backend tokenizes the turns.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modellink.eval.backends.backend import Context, Turn
from modellink.eval.data import Subject
from modellink.eval.rows import Row
from modellink.eval.task import Generate, Style, Task
from modellink.kernels.errors import ModelLinkError


@dataclass(frozen=True)
class EvalSettings:
    """Prompt and sampling settings for all tasks.

    Attributes:
        style: prompt style, `original` or `lm-eval`.
        chat: chat template: a prompt type of data-prep, or `hf-chat-template`; None: plain text.
        language: language of the text around a question in a chat.
        max_new_tokens: maximum tokens of generated answers. Default: that of the task.
        samples: programs generated per question.
        temperature: sampling temperature; 0: greedy decoding.
        top_p: sample from the most likely tokens with this total probability.
        seed: seed of sampling.
    """

    style: str = "original"
    chat: str | None = None
    language: Literal["en", "zh"] = "en"
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def chat_language(self) -> str | None:
        return self.language if self.chat else None

    def label(self, *, written: bool, programs: bool) -> str:
        """Return a description for results and journals, with only the settings that matter for generated answers or programs."""
        words = [self.style, *([f"chat {self.chat} {self.language}"] if self.chat else [])]
        if written and self.max_new_tokens is not None:
            words.append(f"at most {self.max_new_tokens} tokens")
        if programs and (self.samples > 1 or self.temperature):
            words.append(f"{self.samples} samples")
        if written and self.temperature:
            words.append(f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}")
        return ", ".join(words)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        row: row number in the file, from 1.
        digest: digest of the row; does not depend on the prompt.
        context: the prompt: a text, or the turns of a chat.
        choices: texts whose likelihoods are compared; empty if the answer is generated.
        golds: indices of the right choices.
        alone: see `LikelihoodRequest.alone`.
        generate: how the answer is generated and judged.
        target: the right answer as text, or the program that tests an answer.
        program: beginning of a generated program; entry: its function under test.
    """

    subject: str
    row: int
    digest: str
    context: Context
    choices: tuple[str, ...] = ()
    golds: tuple[int, ...] = ()
    alone: bool = False
    generate: Generate | None = None
    target: str = ""
    program: str = ""
    entry: str = ""

    @property
    def prompt(self) -> str:
        """Return the context as text."""
        if isinstance(self.context, str):
            return self.context
        return "\n".join(f"[{turn.role}] {turn.text}" for turn in self.context)

    def key(self, task: Task) -> str:
        """Return the journal key: a digest of everything the answer depends on except the model."""
        parts: list[Any] = [task.name, task.version, self.context, self.choices, self.alone]
        if self.generate is not None:
            parts += [self.generate.until, self.generate.max_tokens, self.target, self.program, self.entry]
        return _digest(parts)


def make_questions(task: Task, settings: EvalSettings, subject: Subject) -> Iterator[Question]:
    """Yield the questions of a subject in the order of its file.

    Raises:
        ModelLinkError: the task lacks the style, a template fails, or the right answer is not one of the choices.
    """
    chat = task.chat_style(settings.language) if settings.chat else None
    writer = _Writer(task, task.way(settings.style, subject.name, settings.chat_language), subject)
    for row in subject.rows:
        question = writer.question(row, settings)
        if settings.chat:
            turns = writer.turns(row) if chat else (Turn("user", str(question.context)),)
            # an answer in a chat begins after a header: the space before a choice belongs to plain text only
            question = replace(question, context=turns, choices=tuple(choice.strip() for choice in question.choices))
        yield question


class _Writer:
    """Prompts of one subject in one style."""

    def __init__(self, task: Task, style: Style, subject: Subject) -> None:
        self.task, self.style, self.subject = task, style, subject
        self.spoken = task.spoken(subject.name)
        self.opening = self._render(style.head, {"about": subject.about})
        self.asked = [(self._render(style.question, values, number, example=True), self._answer(values, number))
                      for number, values in enumerate(subject.examples, 1)]
        self.head = self.opening + "".join(question + answer + style.separator for question, answer in self.asked)

    def question(self, row: Row, settings: EvalSettings) -> Question:
        context = self.head + self._ask(row)
        found = Question(self.subject.name, row.number, _digest(row.values), context)
        style = self.style
        if style.generate is not None:
            generate = style.generate if settings.max_new_tokens is None else replace(
                style.generate, max_tokens=settings.max_new_tokens)
            target, program, entry = (self._render(template, row.values) for template in (
                generate.target or generate.test, generate.prompt, generate.entry))
            if not target.strip():
                raise ModelLinkError("the right answer is missing", where=f"{self.subject.path}, row {row.number}")
            return replace(found, generate=generate, target=target, program=program, entry=entry)
        choices, golds = self._choices(row.values, f"{self.subject.path}, row {row.number}")
        return replace(found, choices=choices, golds=golds, alone=style.tokens == "alone")

    def turns(self, row: Row) -> tuple[Turn, ...]:
        """Make a chat whose first turns are the examples; its first question begins with the introduction."""
        said = [turn for question, answer in self.asked for turn in (Turn("user", question), Turn("assistant", answer.strip()))]
        turns = [*said, Turn("user", self._ask(row))]
        return (Turn("user", self.opening + turns[0].text), *turns[1:])

    def _ask(self, row: Row) -> str:
        return self._render(self.style.question, row.values, len(self.asked) + 1)

    def _choices(self, values: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        style, gold = self.style, values[self.style.gold]
        if isinstance(style.choices, str):
            choices = tuple(f" {text}" for text in values[style.choices])
            answers: Sequence[Any] = [chr(ord("A") + number) for number in range(len(choices))]
        else:
            assert style.choices is not None
            choices, answers = tuple(style.choices.values()), list(style.choices)
        golds = gold if isinstance(gold, list) else [gold]
        wrong = [one for one in golds if one not in answers]
        if wrong or not golds:
            raise ModelLinkError(f"{style.gold} is {wrong[0] if wrong else 'missing'!r}, it must be one of "
                                 f"{', '.join(map(str, answers)) or 'the choices, but the list is empty'}", where=where)
        return choices, tuple(answers.index(one) for one in golds)

    def _answer(self, values: Mapping[str, Any], number: int) -> str:
        if self.style.answer is not None:
            return self._render(self.style.answer, values, number, example=True)
        choices, golds = self._choices(values, f"{self.task.name}, example {number} of {self.subject.name}")
        return choices[golds[0]]

    def _render(self, template: str, values: Mapping[str, Any], number: int = 0, *, example: bool = False) -> str:
        return _render(template, {"subject": self.spoken, "number": number, "example": example, **values}, self.task.name)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _render(template: str, values: Mapping[str, Any], where: str) -> str:
    try:
        return _compiled(template).render(values)
    except jinja2.TemplateError as error:
        raise ModelLinkError(f"a template failed: {error}", where=f"{where}: {template!r}") from None


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)
