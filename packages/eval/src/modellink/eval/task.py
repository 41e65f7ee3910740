"""A benchmark as data: what a task.yaml says, checked when it is read.

Not here: reading the questions (data.py) and making prompts of them (prompts.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from modellink.kernels.errors import ModelLinkError, near

Answer = str | bool
Kind = str | tuple[str, ...]
"""`text` (not blank), `optional` (a text, blank or absent), `bool`, or the texts a column may hold."""
Tokens = Literal["joined", "alone"]
Aggregation = Literal["micro", "macro"]


@dataclass(frozen=True)
class Style:
    """One way to ask, as Jinja templates over the columns of a row and `subject`.

    Attributes:
        question: what stands before an answer; it does not end with a blank, the answer owns the one between them.
        choices: an answer as the data writes it, to the text whose likelihood is measured. Of equals the first one counts.
        head: what stands before everything.
        separator: what follows the answer of each example.
        tokens: see `Request.alone`.
    """

    question: str
    choices: Mapping[Answer, str]
    head: str = ""
    separator: str = "\n\n"
    tokens: Tokens = "joined"


@dataclass(frozen=True)
class Layout:
    """How the data lies on disk.

    Attributes:
        reader: `csv` (no header) or `jsonl`.
        files: file names, `*` standing for the subject; the first of them that finds anything counts.
        columns: name to kind; of a csv file in this order.
    """

    reader: Literal["csv", "jsonl"]
    files: tuple[str, ...]
    columns: Mapping[str, Kind]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        version: goes up whenever a score may change.
        shots: how many solved examples stand before a question.
        examples: the name of the file they are the first rows of, `*` standing for the subject.
        aggregation: which accuracy is the headline: over all questions, or the mean over subjects.
    """

    name: str
    version: int
    summary: str
    data: Layout
    styles: Mapping[str, Style]
    shots: int = 0
    examples: str | None = None
    aggregation: Aggregation = "micro"

    def style(self, name: str) -> Style:
        """Raises ModelLinkError where the task is not asked that way."""
        if name not in self.styles:
            raise ModelLinkError(f"{self.name} has no prompt style {name!r}", where="--prompt-style",
                                 fix=f"choose one of {', '.join(self.styles)}")
        return self.styles[name]


def task_names() -> list[str]:
    """The benchmarks that come with the package."""
    folder = resources.files("modellink.eval") / "tasks"
    return sorted(entry.name for entry in folder.iterdir() if (entry / "task.yaml").is_file())


def load_task(name: str | Path) -> Task:
    """A benchmark of the package by name, or one of your own by the path of its YAML file.

    Raises:
        ModelLinkError: there is none of that name, or its file says something a task cannot have.
    """
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ModelLinkError("the task file is missing", where=path)
        return parse_task(path.read_text(encoding="utf-8"), str(path))
    if name not in task_names():
        raise ModelLinkError(f"there is no task {str(name)!r}", where="--task",
                             fix=near(str(name), task_names()) or f"choose one of {', '.join(task_names())}")
    file = resources.files("modellink.eval") / "tasks" / str(name) / "task.yaml"
    return parse_task(file.read_text(encoding="utf-8"), str(name))


def parse_task(text: str, where: str) -> Task:
    """The task that a YAML text describes; `where` is for messages."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelLinkError(f"not YAML: {error}", where=where) from None
    values = _checked(Task, values, where)
    data = _checked(Layout, values["data"], f"{where}, data")
    if data["reader"] not in ("csv", "jsonl"):
        raise ModelLinkError(f"reader is {data['reader']!r}", where=f"{where}, data", fix="use csv or jsonl")
    columns = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in data["columns"].items()}
    for name, kind in columns.items():
        if kind not in ("text", "optional", "bool") and not isinstance(kind, tuple):
            raise ModelLinkError(f"column {name} is of kind {kind!r}", where=f"{where}, data",
                                 fix="use text, optional, bool, or a list of texts")
    values["data"] = Layout(data["reader"], tuple(data["files"]), columns)
    values["styles"] = {name: _style(style, f"{where}, style {name}") for name, style in values["styles"].items()}
    task = Task(**values)
    if task.aggregation not in get_args(Aggregation):
        raise ModelLinkError(f"aggregation is {task.aggregation!r}", where=where, fix="use micro or macro")
    if task.shots and not task.examples:
        raise ModelLinkError(f"{task.shots} examples are wanted, but no file of examples is named", where=where)
    return task


def _style(values: object, where: str) -> Style:
    style = Style(**_checked(Style, values, where))
    if style.question != style.question.rstrip():
        raise ModelLinkError("the question ends with white space", where=where,
                             fix="let the choices begin with it: tokens of a word and of the blank before it are one")
    if style.tokens not in get_args(Tokens):
        raise ModelLinkError(f"tokens is {style.tokens!r}", where=where, fix="use joined or alone")
    return style


def _checked(cls: type, values: object, where: str) -> dict[str, Any]:
    """`values` as a mapping that has what the dataclass needs and nothing else."""
    if not isinstance(values, dict):
        raise ModelLinkError(f"holds {values!r} where `name: value` lines belong", where=where)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ModelLinkError(f"unknown key {name!r}", where=where, fix=near(str(name), list(fields)) or None)
    missing = [name for name, item in fields.items() if item.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ModelLinkError(f"{', '.join(missing)} is missing", where=where)
    return dict(values)
