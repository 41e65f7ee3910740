"""Two runs side by side: the difference of their scores, and how likely chance alone makes one as large.

Where both runs answered the same questions (told by a digest of the row, so prompts and models may differ) every question is
compared with itself: of the questions on which the two differ, each is as likely to fall to either side if they are equally good
(the exact test of McNemar, Psychometrika 12, 1947). Otherwise, and where an answer can be half right, the difference is held
against its standard error (a z test). No correction is made for looking at several tasks.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modellink.eval.report.write import questions_path
from modellink.kernels.errors import ModelLinkError

Scores = Mapping[tuple[str, str, str], float]
"""(subject, row, digest) to the score of a question."""


@dataclass(frozen=True)
class Comparison:
    """Of one task.

    Attributes:
        first, second: accuracies over the questions that are compared.
        better, worse: on how many questions the second run does better and worse; None where they are not the same questions.
        p: how often runs that are equally good differ as much.
        test: which one was made.
    """

    first: float
    second: float
    questions: int
    better: int | None
    worse: int | None
    p: float
    test: str


def compare(first: Scores, second: Scores) -> Comparison:
    """Two runs over the same questions, or over others."""
    shared = first.keys() & second.keys()
    if not shared:
        return _apart(list(first.values()), list(second.values()))
    changes = [second[key] - first[key] for key in shared]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    one, two = (sum(scores[key] for key in shared) / len(shared) for scores in (first, second))
    if all(change in (-1.0, 0.0, 1.0) for change in changes):
        return Comparison(one, two, len(shared), better, worse, sign_test(better, worse), "McNemar, exact")
    mean = sum(changes) / len(changes)
    spread = sum((change - mean) ** 2 for change in changes) / max(1, len(changes) - 1)
    return Comparison(one, two, len(shared), better, worse, _two_sided(mean, math.sqrt(spread / len(changes))), "paired z")


def sign_test(better: int, worse: int) -> float:
    """Two-sided: how often a fair coin thrown `better + worse` times falls at least as unevenly."""
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, number) for number in range(least + 1))
    return min(1.0, 2 * tail / (1 << count))


def _apart(first: list[float], second: list[float]) -> Comparison:
    means, errors = [], []
    for scores in (first, second):
        mean = sum(scores) / len(scores)
        means.append(mean)
        errors.append(sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1) / len(scores))
    return Comparison(means[0], means[1], min(len(first), len(second)), None, None,
                      _two_sided(means[1] - means[0], math.sqrt(sum(errors))), "unpaired z")


def _two_sided(difference: float, error: float) -> float:
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def print_comparison(one: Path, two: Path, first: Mapping[str, Any], second: Mapping[str, Any],
                     console: Console | None = None) -> None:
    """A row for each task that both have.

    Raises:
        ModelLinkError: they have none in common, or the questions of one are not beside its results.
    """
    tasks = [name for name in first["tasks"] if name in second["tasks"]]
    if not tasks:
        raise ModelLinkError("the two have no task in common", where=f"{one}, {two}")
    table = Table(title=f"{one}\n{two}", title_justify="left", caption_justify="left",
                  caption="first and second: means over the questions that are compared, each counting the same")
    table.add_column("task")
    for heading in ("headlines", "questions", "first", "second", "difference", "better", "worse", "p"):
        table.add_column(heading, justify="right")
    table.add_column("test")
    notes = []
    for name in tasks:
        found = compare(read_scores(one, name), read_scores(two, name))
        results = [run["tasks"][name] for run in (first, second)]
        headlines = ", ".join(f"{100 * run['accuracy']:.2f} %" for run in results)
        table.add_row(name, headlines, str(found.questions), f"{100 * found.first:.2f} %", f"{100 * found.second:.2f} %",
                      f"{100 * (found.second - found.first):+.2f}", *("" if value is None else str(value) for value in (
                          found.better, found.worse)), f"{found.p:.3g}", found.test)
        for what, key in (("prompts", "style"), ("task versions", "version"), ("aggregations", "aggregation")):
            if results[0][key] != results[1][key]:
                notes.append(f"{name}: {what} differ, {results[0][key]} and {results[1][key]}")
        if "macro" in (run["aggregation"] for run in results):
            notes.append(f"{name}: its headline is the mean of its subjects (macro), which is not what the test is about")
    (console or Console()).print(table, *notes, sep="\n")


def read_scores(path: Path, task: str) -> Scores:
    """The score of each question, from the file beside the results."""
    file = questions_path(path if path.is_dir() else path.parent, task)
    if not file.is_file():
        raise ModelLinkError("the questions of a run are missing", where=file, fix="keep them beside its results.json")
    with file.open(encoding="utf-8", newline="") as lines:
        return {(row["subject"], row["row"], row["digest"]): float(row["score"]) for row in csv.DictReader(lines)}
