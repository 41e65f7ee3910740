# SPDX-License-Identifier: Apache-2.0
"""Read and validate a task.yaml; an unknown key or a value of the wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import re
import types
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from modellink.eval.task import Examples, Extraction, Generate, Layout, Style, Task
from modellink.kernels.errors import ModelLinkError, near

KINDS = ("text", "optional", "bool", "texts", "letters")


def task_names() -> list[str]:
    """Return the names of the benchmarks in the package."""
    folder = resources.files("modellink.eval") / "tasks"
    return sorted(entry.name for entry in folder.iterdir() if (entry / "task.yaml").is_file())


def load_task(name: str | Path) -> Task:
    """Load a benchmark of the package by name, or your own by the path of its YAML file.

    Raises:
        ModelLinkError: the name is unknown, or the file is invalid.
    """
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ModelLinkError("the task file is missing", where=path)
        return parse_task(path.read_text(encoding="utf-8"), str(path))
    if name not in task_names():
        raise ModelLinkError(f"unknown task {str(name)!r}", where="--task",
                             fix=near(str(name), task_names()) or f"choose one of {', '.join(task_names())}, or all")
    file = resources.files("modellink.eval") / "tasks" / str(name) / "task.yaml"
    return parse_task(file.read_text(encoding="utf-8"), str(name))


def parse_task(text: str, where: str) -> Task:
    """Parse the YAML text of a task; `where` is for messages. Keys that begin with a dot hold YAML anchors."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelLinkError(f"not YAML: {error}", where=where) from None
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if not str(name).startswith(".")}
    values = _checked(Task, values, where)
    values["data"] = _layout(values["data"], f"{where}, data")
    values["styles"] = {name: tuple(_style(style, f"{where}, style {name}") for style in _list(styles))
                        for name, styles in values["styles"].items()}
    values["chat"] = {name: _style(style, f"{where}, chat {name}") for name, style in values.get("chat", {}).items()}
    values["categories"] = {name: tuple(subjects) for name, subjects in values.get("categories", {}).items()}
    if values.get("examples") is not None:
        values["examples"] = Examples(**_checked(Examples, values["examples"], f"{where}, examples"))
    task = Task(**values)
    if task.shots and not task.examples:
        raise ModelLinkError(f"shots is {task.shots}, but no examples file is given", where=where)
    return task


def _layout(values: object, where: str) -> Layout:
    data = _checked(Layout, values, where)
    columns = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in data["columns"].items()}
    for name, kind in columns.items():
        if kind not in KINDS and not isinstance(kind, tuple):
            raise ModelLinkError(f"column {name} has the unknown kind {kind!r}", where=where,
                                 fix=f"use {', '.join(KINDS)}, or a list of texts")
    return Layout(**data | {"columns": columns})


def _style(values: object, where: str) -> Style:
    checked = _checked(Style, values, where)
    if "generate" in checked:
        checked["generate"] = _generate(checked["generate"], f"{where}, generate")
    style = Style(**checked)
    if (style.choices is None) == (style.generate is None):
        raise ModelLinkError("needs either choices or generate", where=where)
    if style.choices is not None and style.question != style.question.rstrip():
        raise ModelLinkError("the question ends with white space", where=where,
                             fix="begin the choices with it: a word and the space before it are one token")
    return style


def _generate(values: object, where: str) -> Generate:
    checked = _checked(Generate, values, where)
    checked["extract"] = {name: Extraction(**_checked(Extraction, value, f"{where}, extract {name}"))
                          for name, value in checked.get("extract", {}).items()}
    found = Generate(**checked)
    for expression in [*found.ignore, *(extraction.regex for extraction in found.extract.values())]:
        try:
            re.compile(expression)
        except re.error as error:
            raise ModelLinkError(f"not a regular expression: {error}", where=f"{where}: {expression}") from None
    if bool(found.test) == bool(found.extract):
        raise ModelLinkError("needs either a test or ways to extract an answer", where=where)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _checked(cls: type, values: object, where: str) -> dict[str, Any]:
    """Check that `values` is a mapping with the fields of the dataclass and no others; convert lists to tuples."""
    if not isinstance(values, dict):
        raise ModelLinkError(f"holds {values!r} where `name: value` lines are expected", where=where)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ModelLinkError(f"unknown key {name!r}", where=where, fix=near(str(name), list(fields)) or None)
    needed = [name for name, item in fields.items()
              if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ModelLinkError(f"{', '.join(missing)} is missing", where=where)
    hints = get_type_hints(cls)
    return {name: _value(hints[name], value, name, where) for name, value in values.items()}


def _value(hint: Any, value: Any, name: str, where: str) -> Any:
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ModelLinkError(f"{name} is {value!r}", where=where, fix=f"use {' or '.join(get_args(hint))}")
    if hint in (str, int, bool) and type(value) is not hint:
        raise ModelLinkError(f"{name} is {value!r}, it must be of type {hint.__name__}", where=where)
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(value) if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds) else value
