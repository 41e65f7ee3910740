"""A benchmark as data: what a task.yaml may say. Reading one, with all checks, is in taskfile.py.

Not here: reading the questions (data.py) and making prompts of them (prompts.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from modellink.kernels.errors import ModelLinkError

Answer = str | bool
Kind = str | tuple[str, ...]
"""`text` (not blank), `optional` (a text, blank or absent), `bool`, `texts` (a list of them, or absent), `letters` (a capital
letter, a list of them, or absent), or the texts a column may hold."""
Tokens = Literal["joined", "alone"]
Aggregation = Literal["micro", "macro"]
Compare = Literal["text", "math"]


@dataclass(frozen=True)
class Extraction:
    """How an answer is found in a text: what the expression's first group that is not empty says, or all it matches.

    Attributes:
        regex: searched in the text; `^` and `$` are the ends of the text.
        pick: which of several matches counts.
    """

    regex: str
    pick: Literal["first", "last"] = "first"


@dataclass(frozen=True)
class Generate:
    """An answer that the model writes.

    Attributes:
        until: strings that end it and are not part of it, beside the model's end tokens.
        max_tokens: its longest length.
        target: a template of the right answer.
        extract: ways to find the answer in the text, by name; the first one is the score, the others stand beside it.
        ignore: expressions that are removed from both answers before they are compared.
        ignore_case: compare without regard to case.
        compare: `text` as it is, or `math` as kinds/mathtext.py does.
        test: a template of a program that is run after the one written, which proves it by ending without an error.
        prompt: a template of the beginning of that program, which the text goes on with.
        entry: a template of the name of the function that the test calls.
    """

    until: tuple[str, ...]
    max_tokens: int
    target: str = ""
    extract: Mapping[str, Extraction] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False
    compare: Compare = "text"
    test: str = ""
    prompt: str = ""
    entry: str = ""


@dataclass(frozen=True)
class Style:
    """One way to ask, as Jinja templates over the columns of a row, `subject` (its spoken name), `number` and
    `example` (whether it is one).

    Attributes:
        question: what stands before an answer; where the choices are given it does not end with a blank, they own it.
        subjects: patterns of the subjects it is for; with none for all of them.
        generate: how an answer is written and judged; None where choices are compared.
        choices: an answer as the data writes it, to the text whose likelihood is measured, of equals the first one counts;
            or the name of a column of texts. None where the answer is generated.
        gold: the column of the right answer; for a column of choices, letters.
        answer: the answer of an example; without it the text of its choice.
        head: what stands before everything.
        separator: what follows the answer of each example.
        shots: how many of the task's examples are shown; None for all.
        tokens: of a choice: `joined`, those that follow the question's where both are one text; `alone`, the last one of the
            choice by itself.
    """

    question: str
    subjects: tuple[str, ...] = ()
    choices: Mapping[Answer, str] | str | None = None
    generate: Generate | None = None
    gold: str = "answer"
    answer: str | None = None
    head: str = ""
    separator: str = "\n\n"
    shots: int | None = None
    tokens: Tokens = "joined"


@dataclass(frozen=True)
class Layout:
    """How the data lies on disk.

    Attributes:
        reader: `csv` (no header), `csv-header`, `jsonl` (also .gz) or `json` (an object whose `examples` are the rows).
        files: file names, `*` standing for the subject; the first of them that finds anything counts.
        columns: name to kind; of a csv file without a header in this order.
        subjects: all that there are; files of other names are left alone. None: any.
    """

    reader: Literal["csv", "csv-header", "jsonl", "json"]
    files: tuple[str, ...]
    columns: Mapping[str, Kind]
    subjects: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Examples:
    """Where solved examples come from.

    Attributes:
        file: `folder/name`, `*` standing for the subject; in that folder or without it, beside the questions or one folder up.
        reader: `rows` (a file like that of the questions), or the layout of a paper's own prompts, see examples.py.
        samples: the examples themselves, as columns of a row.
    """

    file: str | None = None
    reader: Literal["rows", "bbh-prompts", "agieval-prompts"] = "rows"
    samples: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: what it is called in commands, file names and results.
        version: goes up whenever a score may change.
        summary: one sentence.
        data: how the data lies on disk.
        styles: `original`, `lm-eval` or both, each a way to ask or a list of them for some subjects each.
        shots: how many solved examples stand before a question at most.
        examples: where they come from.
        aggregation: which accuracy is the headline: over all questions, or the mean over subjects.
        categories: name to the subjects it holds.
        names: a subject to how it is spoken of in prompts; where it is not there, its own name with blanks for underscores.
        chat: language to the way to ask where the prompt is a chat and the examples are turns of it.
    """

    name: str
    version: int
    summary: str
    data: Layout
    styles: Mapping[str, tuple[Style, ...]]
    shots: int = 0
    examples: Examples | None = None
    aggregation: Aggregation = "micro"
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    chat: Mapping[str, Style] = field(default_factory=dict)

    def style(self, name: str, subject: str = "") -> Style:
        """How a subject is asked. Raises ModelLinkError where the task is not asked that way."""
        if name not in self.styles:
            raise ModelLinkError(f"{self.name} has no prompt style {name!r}", where="--prompt-style",
                                 fix=f"choose one of {', '.join(self.styles)}")
        styles = self.styles[name]
        fitting = (style for style in styles if any(fnmatchcase(subject, pattern) for pattern in style.subjects or ("*",)))
        return next(fitting, styles[-1])

    def way(self, name: str, subject: str, language: str | None) -> Style:
        """How a subject is asked, in a chat where a language is given and the task has a way of its own for that."""
        return (self.chat_style(language) if language else None) or self.style(name, subject)

    def shown(self, name: str, subject: str, language: str | None) -> int:
        """How many examples are shown at most."""
        shots = self.way(name, subject, language).shots
        return self.shots if shots is None else min(self.shots, shots)

    def chat_style(self, language: str) -> Style | None:
        """How it is asked in a chat, None where it has no way of its own. Raises ModelLinkError for a language it is not in."""
        if self.chat and language not in self.chat:
            raise ModelLinkError(f"{self.name} is not asked in {language!r}", where="--eval-language",
                                 fix=f"choose one of {', '.join(self.chat)}")
        return self.chat.get(language)

    def spoken(self, subject: str) -> str:
        return self.names.get(subject, subject.replace("_", " "))

    def category(self, subject: str) -> str | None:
        return next((name for name, subjects in self.categories.items() if subject in subjects), None)

    @property
    def runs_code(self) -> bool:
        return any(style.generate is not None and bool(style.generate.test)
                   for styles in self.styles.values() for style in styles)
