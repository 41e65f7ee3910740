# SPDX-License-Identifier: Apache-2.0
"""Compute accuracies and standard errors from the marks of questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from modellink.eval.task import Task


@dataclass(frozen=True)
class Mark:
    """The mark of an answer.

    Attributes:
        score: 1 if right, 0 if wrong, or the fraction of several answers that are right.
        answer: the answer as text.
        right: the right answer.
        unparsed: no answer was found in the text; it counts as wrong.
        margin: log-likelihood of the right answer minus that of the best wrong one, in nats; None for generated answers.
        also: scores by other rules, by name.
    """

    score: float
    answer: str
    right: str
    unparsed: bool = False
    margin: float | None = None
    also: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Accuracy:
    """The accuracy over `questions`.

    Attributes:
        correct: sum of the scores of the questions.
        stderr: standard error of the mean, sqrt(sum (score - mean)^2 / (n - 1) / n), which for scores of 0 and 1 is
            sqrt(p (1 - p) / (n - 1)); None for a single question.
        unparsed: number of answers not found in the generated text.
        also: accuracy by other rules, by name.
    """

    questions: int
    correct: float
    accuracy: float
    stderr: float | None
    unparsed: int
    also: Mapping[str, float]


def accuracy(marks: Sequence[Mark]) -> Accuracy:
    """Return the accuracy over at least one mark."""
    count, correct = len(marks), sum(mark.score for mark in marks)
    mean = correct / count
    spread = sum((mark.score - mean) ** 2 for mark in marks)
    names = {name: None for mark in marks for name in mark.also}
    also = {}
    for name in names:
        found = [mark.also[name] for mark in marks if name in mark.also]
        also[name] = sum(found) / len(found)
    return Accuracy(count, int(correct) if correct == int(correct) else correct, mean,
                    math.sqrt(spread / (count - 1) / count) if count > 1 else None, sum(mark.unparsed for mark in marks), also)


def macro(subjects: Sequence[Accuracy]) -> tuple[float, float | None]:
    """Return the unweighted mean of the subjects' accuracies, and its standard error (subjects are independent)."""
    mean = sum(subject.accuracy for subject in subjects) / len(subjects)
    errors = [subject.stderr for subject in subjects]
    known = [error for error in errors if error is not None]
    return mean, math.sqrt(sum(error * error for error in known)) / len(errors) if len(known) == len(errors) else None


def summarize(marks: Mapping[str, Sequence[Mark]], task: Task) -> dict[str, Any]:
    """Return the scores of a task as JSON values, from the marks of each subject. A category weighs all questions equally."""
    subjects = {name: accuracy(found) for name, found in marks.items()}
    micro = accuracy([mark for found in marks.values() for mark in found])
    mean, error = macro(list(subjects.values()))
    headline = (micro.accuracy, micro.stderr) if task.aggregation == "micro" else (mean, error)
    grouped: dict[str, list[Mark]] = {name: [] for name in task.categories}
    for name, found in marks.items():
        if (category := task.category(name)) is not None:
            grouped[category] += found
    return {"accuracy": headline[0], "stderr": headline[1], "aggregation": task.aggregation, "micro": asdict(micro),
            "macro": {"subjects": len(subjects), "accuracy": mean, "stderr": error},
            "categories": {name: asdict(accuracy(found)) for name, found in grouped.items() if found},
            "subjects": {name: asdict(subject) for name, subject in subjects.items()},
            "category_of": {name: category for name in subjects if (category := task.category(name)) is not None}}
