"""The questions on disk: found by file name and content below the folders a user names, read strictly.

A file counts as a task's when its name fits and its first rows do. In a folder where one file fits, every file of that name
must: a broken first row is an error there, not a file of somebody else. Rows are never skipped.

Not here: downloading anything.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from modellink.eval.task import Kind, Layout, Task
from modellink.kernels.errors import ModelLinkError

DEPTH = 4  # folders below the one that is named
FIRST = 3  # rows that tell whose file it is: a header may look like a row, the rows after it do not
SEEN = 4  # files listed in a message


@dataclass(frozen=True)
class Row:
    """One row: its number in the file from 1, and its columns."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """The questions of one file, and the solved examples that go before them."""

    name: str
    path: Path
    rows: Sequence[Row]
    examples: Sequence[Row]


def read_subjects(task: Task, folders: Sequence[Path], max_samples: int | None = None) -> list[Subject]:
    """Everything of a task below the folders, sorted by subject.

    Args:
        max_samples: take only that many rows of each subject, from its beginning; the rows after them are checked too.

    Raises:
        ModelLinkError: no folder, nothing that fits in it, a subject twice, a broken row (named with file and row), an empty
            file, examples that are not there.
    """
    subjects = []
    for name, path in find_files(task.data, task.name, folders).items():
        rows = list(read_rows(path, task.data))
        if not rows:
            raise ModelLinkError("the file has no rows", where=path)
        examples = _examples(task, name, path)
        subjects.append(Subject(name, path, rows[:max_samples], examples))
    return subjects


def find_files(layout: Layout, task: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Subject to file, sorted by subject; see `read_subjects`."""
    for folder in folders:
        if not folder.is_dir():
            raise ModelLinkError("there is no such folder", where=f"--task-data-path {folder}")
    files = list(dict.fromkeys(path for folder in folders for path in _walk(folder)))
    unfit: dict[Path, str] = {}
    for pattern in layout.files:
        named = {path: match for path in files if (match := _pattern(pattern).fullmatch(path.name))}
        reasons = {path: _unfit(path, layout) for path in named}
        at_home = {path.parent for path, reason in reasons.items() if reason is None}
        found: dict[str, Path] = {}
        for path, match in named.items():
            if path.parent not in at_home:
                unfit.setdefault(path, str(reasons[path]))
                continue
            name = match["subject"] if "subject" in match.groupdict() else path.stem
            if name in found and not path.samefile(found[name]):
                raise ModelLinkError(f"{task}: {name} is there twice: {found[name]} and {path}", where="--task-data-path",
                                     fix="name the folder of one of them")
            found.setdefault(name, path)
        if found:
            return dict(sorted(found.items()))
    looked = f"files named {' or '.join(layout.files)} ({layout.reader}: {', '.join(layout.columns)})"
    seen = "".join(f"; {reason}" for reason in list(unfit.values())[:SEEN])
    raise ModelLinkError(f"there is no data of {task}", where="--task-data-path " + " ".join(map(str, folders)),
                         fix=f"looked for {looked}, {DEPTH} folders deep{seen}")


def read_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The checked rows of a file; blank lines are none."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, raw in _RAW[layout.reader](file):
                number += 1
                where = f"{path}, row {number}" + (f" (line {line})" if line != number else "")
                yield Row(number, _columns(raw, layout, where))
    except UnicodeDecodeError as error:
        raise ModelLinkError(f"not UTF-8 text: {error.reason}", where=f"{path}, after row {number}",
                             fix="write the file in UTF-8") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise ModelLinkError(f"not {layout.reader}: {error}", where=f"{path}, row {number + 1}") from None
    except OSError as error:
        raise ModelLinkError(f"cannot be read: {error.strerror}", where=path) from None


def _csv(file: Any) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    for row in reader:
        if row:
            yield reader.line_num, row


def _jsonl(file: Any) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, 1):
        if text.strip():
            yield line, json.loads(text)


_RAW = {"csv": _csv, "jsonl": _jsonl}


def _columns(raw: Any, layout: Layout, where: str) -> dict[str, Any]:
    names = ", ".join(layout.columns)
    if layout.reader == "csv":
        if len(raw) != len(layout.columns):
            raise ModelLinkError(f"{len(raw)} columns, there must be {len(layout.columns)}: {names}", where=where)
        raw = dict(zip(layout.columns, raw, strict=True))
    elif not isinstance(raw, dict):
        raise ModelLinkError(f"not an object with {names}", where=where)
    return {name: _value(raw.get(name), kind, name, where) for name, kind in layout.columns.items()}


def _value(value: Any, kind: Kind, name: str, where: str) -> Any:
    if kind == "optional":
        if value is None or isinstance(value, str):
            return value or ""
        wanted = "a text"
    elif kind == "text":
        if isinstance(value, str) and value.strip():
            return value
        wanted = "a text that is not blank"
    elif kind == "bool":
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    else:
        if value in kind:
            return value
        wanted = "one of " + ", ".join(kind)
    shown = "missing" if value is None else repr(value)[:60]
    raise ModelLinkError(f"{name} is {shown}, it must be {wanted}", where=where)


def _unfit(path: Path, layout: Layout) -> str | None:
    """Why the first rows of a file are none of this layout; an empty file is somebody else's."""
    try:
        return None if list(islice(read_rows(path, layout), FIRST)) else f"{path} is empty"
    except ModelLinkError as error:
        return f"{error.where} does not fit: {error.what}"


def _examples(task: Task, subject: str, path: Path) -> list[Row]:
    """The first rows of the subject's file of examples: beside the questions, or in a folder `dev` there or one up."""
    if not task.shots or task.examples is None:
        return []
    name = task.examples.replace("*", subject)
    places = [path.parent / name, path.parent / "dev" / name, path.parent.parent / "dev" / name]
    for place in places:
        if place.is_file():
            rows = list(read_rows(place, task.data))
            if len(rows) < task.shots:
                raise ModelLinkError(f"{len(rows)} rows, {task.name} needs {task.shots} examples", where=place)
            return rows[:task.shots]
    raise ModelLinkError(f"the examples of {subject} are missing", where=path, fix=f"put {name} into {places[-1].parent}")


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(?P<subject>.+)", 1))


def _walk(top: Path) -> Iterator[Path]:
    """Files below a folder, links followed, hidden names left out, sorted."""
    for folder, folders, files in os.walk(top, followlinks=True):
        depth = len(Path(folder).relative_to(top).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))
