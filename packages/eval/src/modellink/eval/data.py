"""The questions on disk: found by file name and content below the folders a user names, read strictly.

A file counts as a task's when its name fits and its first rows do. In a folder where one file fits, every file of that name
must: a broken first row is an error there, not a file of somebody else. Rows are never skipped.

Not here: downloading anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from modellink.eval.examples import read_examples
from modellink.eval.rows import Row, read_rows
from modellink.eval.task import Layout, Task
from modellink.kernels.errors import ModelLinkError

DEPTH = 4  # folders below the one that is named
FIRST = 3  # rows that tell whose file it is: a header may look like a row, the rows after it do not
SEEN = 4  # files listed in a message


@dataclass(frozen=True)
class Subject:
    """The questions of one file, and what the solved examples before them hold.

    Attributes:
        about: what the paper's prompts say before the examples, where they say something.
    """

    name: str
    path: Path
    rows: Sequence[Row]
    examples: Sequence[Mapping[str, Any]]
    about: str = ""


def read_subjects(task: Task, folders: Sequence[Path], max_samples: int | None = None,
                  shots: Callable[[str], int] | None = None) -> list[Subject]:
    """Everything of a task below the folders, sorted by subject.

    Args:
        shots: how many examples of a subject are shown; None for the most the task has. Where it is none, no file is needed.
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
        examples, about = read_examples(task, name, path, task.shots if shots is None else shots(name))
        subjects.append(Subject(name, path, rows[:max_samples], examples, about))
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
            name = match["subject"] if "subject" in match.groupdict() else path.name.split(".")[0]
            if layout.subjects is not None and name not in layout.subjects:
                unfit.setdefault(path, f"{path} is not named like one of its subjects")
                continue
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


def _unfit(path: Path, layout: Layout) -> str | None:
    """Why the first rows of a file are none of this layout; an empty file is somebody else's."""
    try:
        return None if list(islice(read_rows(path, layout), FIRST)) else f"{path} is empty"
    except ModelLinkError as error:
        return f"{error.where} does not fit: {error.what}"


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(?P<subject>.+)", 1))


def _walk(top: Path) -> Iterator[Path]:
    """Files below a folder, links followed, hidden names left out, sorted."""
    for folder, folders, files in os.walk(top, followlinks=True):
        depth = len(Path(folder).relative_to(top).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))
