# SPDX-License-Identifier: Apache-2.0
"""Compare two runs: the difference of their scores, and the probability that chance causes one as large.

If both runs answered the same questions (identified by a digest of the row; prompts and models may differ), the test is paired:
among the questions on which the runs differ, each side is equally likely if the runs are equally good (exact test of McNemar,
Psychometrika 12, 1947). Otherwise, and if answers can be partly right, the difference is compared with its standard error (a z
test). There is no correction for multiple tasks.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink.eval.report.write import questions_path
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.tables import print_table

Scores = Mapping[tuple[str, str, str], float]
"""Score of a question by (subject, row, digest)."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of one task.

    Attributes:
        first, second: accuracies over the compared questions.
        better, worse: number of questions on which the second run is better and worse; None if the questions differ.
        p: probability that equally good runs differ as much.
        test: name of the test.
    """

    first: float
    second: float
    questions: int
    better: int | None
    worse: int | None
    p: float
    test: str


def compare(first: Scores, second: Scores) -> Comparison:
    """Compare two runs over the same or over different questions."""
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
    """Return the two-sided probability that `better + worse` tosses of a fair coin are at least as uneven."""
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


def print_comparison(one: Path, two: Path, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Print a comparison for each task of both runs.

    Raises:
        ModelLinkError: the runs have no task in common, or the questions file of a run is missing.
    """
    tasks = [name for name in first["tasks"] if name in second["tasks"]]
    if not tasks:
        raise ModelLinkError("the two runs have no task in common", where=f"{one}, {two}")
    rows, notes = [], []
    for name in tasks:
        found = compare(read_scores(one, name), read_scores(two, name))
        results = [run["tasks"][name] for run in (first, second)]
        headlines = ", ".join(f"{100 * run['accuracy']:.2f} %" for run in results)
        changed = ["" if value is None else str(value) for value in (found.better, found.worse)]
        rows.append((name, headlines, found.questions, f"{100 * found.first:.2f} %", f"{100 * found.second:.2f} %",
                     f"{100 * (found.second - found.first):+.2f}", *changed, f"{found.p:.3g}", found.test))
        for what, key in (("prompts", "style"), ("task versions", "version"), ("aggregations", "aggregation")):
            if results[0][key] != results[1][key]:
                notes.append(f"{name}: {what} differ, {results[0][key]} and {results[1][key]}")
        if "macro" in (run["aggregation"] for run in results):
            notes.append(f"{name}: its headline is the mean over subjects (macro), which this test does not compare")
    numbers = ("headlines", "questions", "first", "second", "change", "better", "worse", "p")
    print_table(("task", *numbers, "test"), rows, title=f"first: {one}\nsecond: {two}", right=numbers, wrap="task",
                optional=("headlines", "test"))
    print("first and second: unweighted means over the compared questions", *notes, sep="\n", flush=True)


def read_scores(path: Path, task: str) -> Scores:
    """Read the score of each question from the file next to the results."""
    file = questions_path(path if path.is_dir() else path.parent, task)
    if not file.is_file():
        raise ModelLinkError("the questions file of a run is missing", where=file, fix="keep it next to results.json")
    with file.open(encoding="utf-8", newline="") as lines:
        return {(row["subject"], row["row"], row["digest"]): float(row["score"]) for row in csv.DictReader(lines)}
