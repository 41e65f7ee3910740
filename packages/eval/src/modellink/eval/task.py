# SPDX-License-Identifier: Apache-2.0
"""The dataclasses of a task.yaml; taskfile.py reads and validates it.

Not here: reading the questions (data.py) and making prompts (prompts.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from modellink.kernels.errors import ModelLinkError

Answer = str | bool
Kind = str | tuple[str, ...]
"""`text` (not blank), `optional` (a text, blank or absent), `bool`, `texts` (a list of texts, or absent), `letters` (a capital
letter, a list of them, or absent), or the list of allowed texts."""
Tokens = Literal["joined", "alone"]
Aggregation = Literal["micro", "macro"]
Compare = Literal["text", "math"]


@dataclass(frozen=True)
class Extraction:
    """How an answer is extracted from a text: the first nonempty group of the expression, or the entire match.

    Attributes:
        regex: searched in the text; `^` and `$` are the ends of the text.
        pick: which of several matches is used.
    """

    regex: str
    pick: Literal["first", "last"] = "first"


@dataclass(frozen=True)
class Generate:
    """A generated answer.

    Attributes:
        until: stop strings, in addition to the model's end tokens; they are not part of the answer.
        max_tokens: maximum length.
        target: template of the right answer.
        extract: ways to find the answer in the text, by name; the first gives the score, the others are reported too.
        ignore: expressions that are removed from both answers before the comparison.
        ignore_case: ignore case in the comparison.
        compare: `text`, or `math` by the rules of kinds/mathtext.py.
        test: template of a program that runs after the generated one and passes if it ends without an error.
        prompt: template of the beginning of the program, which the model continues.
        entry: template of the name of the function that the test calls.
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
    """One prompt style: Jinja templates over the columns of a row, `subject` (its display name), `number` and
    `example` (whether the row is an example).

    Attributes:
        question: the text before an answer. With choices it does not end with a space; the choices begin with it.
        subjects: patterns of the subjects the style is for. Default: all.
        generate: how an answer is generated and judged; None if choices are compared.
        choices: the text whose likelihood is measured, by the answer in the data (the first wins a tie); or the name of a column
            of texts. None if the answer is generated.
        gold: column of the right answer; letters for a column of choices.
        answer: the answer of an example. Default: the text of its choice.
        head: the text at the start of the prompt.
        separator: the text after the answer of each example.
        shots: number of the task's examples that are shown. Default: all.
        tokens: the tokens of a choice that count: `joined`, those after the question when both are tokenized as one text;
            `alone`, the last token of the choice tokenized on its own.
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
    """The files of a task's data.

    Attributes:
        reader: `csv` (no header), `csv-header`, `jsonl` (also .gz) or `json` (an object whose `examples` are the rows).
        files: file names, with `*` for the subject; the first name that matches any file is used.
        columns: kind of each column; in the order of the file for csv without a header.
        subjects: names of all subjects; other files are ignored. None: any.
    """

    reader: Literal["csv", "csv-header", "jsonl", "json"]
    files: tuple[str, ...]
    columns: Mapping[str, Kind]
    subjects: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Examples:
    """The source of solved examples.

    Attributes:
        file: `folder/name`, with `*` for the subject; searched next to the questions and one folder up, with and without folder.
        reader: `rows` (same format as the questions), or the format of a paper's prompts, see examples.py.
        samples: the examples themselves, as columns of a row.
    """

    file: str | None = None
    reader: Literal["rows", "bbh-prompts", "agieval-prompts"] = "rows"
    samples: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: name in commands, file names and results.
        version: increased whenever a score may change.
        summary: one sentence.
        data: the files of the data.
        styles: `original`, `lm-eval` or both; each is a style, or a list of styles for different subjects.
        shots: maximum number of solved examples before a question.
        examples: source of the examples.
        aggregation: the headline accuracy: over all questions, or the mean over subjects.
        categories: the subjects of each category.
        names: display name of a subject in prompts. Default: its name with spaces for underscores.
        chat: the style for chats, by language; the examples are turns of the chat.
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
        """Return the style of a subject; raise ModelLinkError if the task lacks the style."""
        if name not in self.styles:
            raise ModelLinkError(f"{self.name} has no prompt style {name!r}", where="--prompt-style",
                                 fix=f"choose one of {', '.join(self.styles)}")
        styles = self.styles[name]
        fitting = (style for style in styles if any(fnmatchcase(subject, pattern) for pattern in style.subjects or ("*",)))
        return next(fitting, styles[-1])

    def way(self, name: str, subject: str, language: str | None) -> Style:
        """Return the style of a subject; with a language, the chat style of the task if it has one."""
        return (self.chat_style(language) if language else None) or self.style(name, subject)

    def shown(self, name: str, subject: str, language: str | None) -> int:
        """Return the maximum number of examples."""
        shots = self.way(name, subject, language).shots
        return self.shots if shots is None else min(self.shots, shots)

    def chat_style(self, language: str) -> Style | None:
        """Return the chat style, or None if the task has none; raise ModelLinkError for a language it lacks."""
        if self.chat and language not in self.chat:
            raise ModelLinkError(f"{self.name} has no prompts in {language!r}", where="--eval-language",
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
