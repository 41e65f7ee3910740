"""From likelihoods to accuracies, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


def choose(logprobs: Sequence[float]) -> int:
    """The index of the most likely choice; of equals the first."""
    return max(range(len(logprobs)), key=lambda index: logprobs[index])


def per_byte(logprobs: Sequence[float], choices: Sequence[str]) -> list[float]:
    """Log-probabilities divided by the choices' lengths in UTF-8 bytes, without the blank before them."""
    return [value / max(1, len(text.strip().encode())) for value, text in zip(logprobs, choices, strict=True)]


@dataclass(frozen=True)
class Accuracy:
    """How many of `questions` were right.

    Attributes:
        stderr: standard error of the mean, sqrt(p (1 - p) / (n - 1)); None for a single question.
        accuracy_per_byte: the same accuracy where the choice with the highest log-probability per byte is taken.
    """

    questions: int
    correct: int
    accuracy: float
    stderr: float | None
    accuracy_per_byte: float


def accuracy(right: Sequence[bool], right_per_byte: Sequence[bool]) -> Accuracy:
    """Of one subject or of all questions together; there must be at least one."""
    count, correct = len(right), sum(right)
    mean = correct / count
    stderr = math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
    return Accuracy(count, correct, mean, stderr, sum(right_per_byte) / count)


def macro(subjects: Sequence[Accuracy]) -> tuple[float, float | None]:
    """The mean of the subjects' accuracies, each counting the same, and its standard error (subjects are independent)."""
    mean = sum(subject.accuracy for subject in subjects) / len(subjects)
    errors = [subject.stderr for subject in subjects]
    known = [error for error in errors if error is not None]
    return mean, math.sqrt(sum(error * error for error in known)) / len(errors) if len(known) == len(errors) else None


def summarise(right: Mapping[str, Sequence[tuple[bool, bool]]], aggregation: str) -> dict[str, Any]:
    """The numbers of a task as JSON holds them.

    Args:
        right: by subject, for each question whether the most likely choice and the most likely per byte are right.
        aggregation: which accuracy is the headline, `micro` or `macro`.
    """
    subjects = {name: accuracy(*zip(*marks, strict=True)) for name, marks in right.items()}
    micro = accuracy(*zip(*(mark for marks in right.values() for mark in marks), strict=True))
    mean, error = macro(list(subjects.values()))
    headline = (micro.accuracy, micro.stderr) if aggregation == "micro" else (mean, error)
    return {"accuracy": headline[0], "stderr": headline[1], "aggregation": aggregation, "micro": asdict(micro),
            "macro": {"subjects": len(subjects), "accuracy": mean, "stderr": error},
            "subjects": {name: asdict(subject) for name, subject in subjects.items()}}
