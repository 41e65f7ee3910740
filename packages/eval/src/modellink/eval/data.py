# SPDX-License-Identifier: Apache-2.0
"""Find the data of a task by file name and content below the given folders, and read it strictly.

A file belongs to a task if its name and its first rows match. If one file of a folder matches, all files with a matching name
must: a broken first row is then an error and not an unrelated file. Rows are never skipped.

Not here: downloads.
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

DEPTH = 4  # levels of subfolders
FIRST = 3  # rows that identify a file: a header may look like a row, the rows after it do not
SEEN = 4  # files listed in a message


@dataclass(frozen=True)
class Subject:
    """The questions of one file, with the solved examples shown before them.

    Attributes:
        about: introduction before the examples in the paper's prompts, if any.
    """

    name: str
    path: Path
    rows: Sequence[Row]
    examples: Sequence[Mapping[str, Any]]
    about: str = ""


def read_subjects(task: Task, folders: Sequence[Path], max_samples: int | None = None,
                  shots: Callable[[str], int] | None = None) -> list[Subject]:
    """Read all subjects of a task below the folders, sorted by name.

    Args:
        shots: number of examples per subject. Default: the maximum of the task. With 0, no example file is needed.
        max_samples: use only the first rows of each subject; the remaining rows are still validated.

    Raises:
        ModelLinkError: a folder, its data or the examples are missing, a subject occurs twice, a row is broken (named by file and
            row), or a file is empty.
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
    """Return the file of each subject, sorted by subject; see `read_subjects`."""
    for folder in folders:
        if not folder.is_dir():
            raise ModelLinkError("the folder does not exist", where=f"--task-data-path {folder}")
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
                unfit.setdefault(path, f"{path} is not named after one of its subjects")
                continue
            if name in found and not path.samefile(found[name]):
                raise ModelLinkError(f"{task}: {name} was found twice: {found[name]} and {path}", where="--task-data-path",
                                     fix="give the folder of one of them")
            found.setdefault(name, path)
        if found:
            return dict(sorted(found.items()))
    looked = f"files named {' or '.join(layout.files)} ({layout.reader}: {', '.join(layout.columns)})"
    seen = "".join(f"; {reason}" for reason in list(unfit.values())[:SEEN])
    raise ModelLinkError(f"no data of {task} was found", where="--task-data-path " + " ".join(map(str, folders)),
                         fix=f"expected {looked}, at most {DEPTH} folders deep{seen}")


def _unfit(path: Path, layout: Layout) -> str | None:
    """Return why the first rows of a file do not match the layout; an empty file never matches."""
    try:
        return None if list(islice(read_rows(path, layout), FIRST)) else f"{path} is empty"
    except ModelLinkError as error:
        return f"{error.where} does not match: {error.what}"


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(?P<subject>.+)", 1))


def _walk(top: Path) -> Iterator[Path]:
    """Return the files below a folder, sorted, following links, without hidden names."""
    for folder, folders, files in os.walk(top, followlinks=True):
        depth = len(Path(folder).relative_to(top).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))
