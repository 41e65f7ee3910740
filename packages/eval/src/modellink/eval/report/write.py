# SPDX-License-Identifier: Apache-2.0
"""Write the files next to results.json: a CSV of subjects, a CSV of questions, and an HTML page."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.eval.job import Job
from modellink.eval.report.page import write_page
from modellink.eval.score import Mark
from modellink.kernels.files import atomic_write

SUBJECT_COLUMNS = ("task", "subject", "category", "questions", "correct", "accuracy", "stderr", "unparsed")
QUESTION_COLUMNS = ("digest", "subject", "row", "score", "unparsed", "margin", "answer", "right")


def write_reports(output: Path, job: Job, marks: Sequence[Mark], results: Mapping[str, Any]) -> None:
    with atomic_write(questions_path(output, job.task.name), "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(QUESTION_COLUMNS)
        for question, mark in zip(job.questions, marks, strict=True):
            writer.writerow((question.digest, question.subject, question.row, f"{mark.score:g}", int(mark.unparsed),
                             "" if mark.margin is None else f"{mark.margin:.6g}", mark.answer, mark.right))
    with atomic_write(output / "results.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SUBJECT_COLUMNS)
        for name, task in results["tasks"].items():
            writer.writerows(_subject_rows(name, task))
    write_page(output / f"{job.task.name}.html", job, marks, results)


def questions_path(output: Path, task: str) -> Path:
    return output / f"{task}.questions.csv"


def _subject_rows(name: str, task: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for subject, score in task["subjects"].items():
        yield name, subject, task["category_of"].get(subject, ""), *_numbers(score)
    for category, score in task["categories"].items():
        yield name, "(category)", category, *_numbers(score)
    yield name, "(micro)", "", *_numbers(task["micro"])
    yield name, "(macro)", "", *_numbers(task["macro"])


def _numbers(score: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple("" if (value := score.get(column)) is None else value for column in SUBJECT_COLUMNS[3:])
