# SPDX-License-Identifier: Apache-2.0
"""Prepare a run: read the data of the tasks and make the prompts, before anything is computed or written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink.eval.data import Subject, read_subjects
from modellink.eval.prompts import EvalSettings, Question, make_questions
from modellink.eval.task import Task
from modellink.eval.taskfile import load_task, task_names
from modellink.kernels.errors import ModelLinkError

FORMAT = 2


@dataclass(frozen=True)
class Job:
    """A task with its data and prompts."""

    task: Task
    settings: EvalSettings
    subjects: Sequence[Subject]
    questions: Sequence[Question]

    @property
    def runs_code(self) -> bool:
        return any(question.generate is not None and question.generate.test for question in self.questions)

    @property
    def style(self) -> str:
        """Return a short description of the prompt settings."""
        return self.settings.label(written=any(question.generate for question in self.questions), programs=self.runs_code)

    def header(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first line of the journal."""
        return {"journal": FORMAT, "task": self.task.name, "version": self.task.version, "style": self.style,
                "model": dict(model)}


def prepare(task: str | Path | Sequence[str | Path], data: Path | str | Sequence[Path | str], settings: EvalSettings,
            max_samples: int | None = None) -> list[Job]:
    """Read tasks and data and make the prompts.

    Raises:
        ModelLinkError: a task or style is unknown, or data is missing or broken.
    """
    names = [task] if isinstance(task, (str, Path)) else list(task)
    folders = [Path(folder) for folder in ([data] if isinstance(data, (str, Path)) else data)]
    if not names or not folders:
        raise ModelLinkError("a task and a folder with its data are required", where="--task, --task-data-path")
    if max_samples is not None and max_samples < 1:
        raise ModelLinkError(f"the number of questions per subject is {max_samples}, it must be at least 1",
                             where="--max-eval-samples")
    if settings.samples > 1 and not settings.temperature:
        raise ModelLinkError(f"{settings.samples} samples without a temperature are {settings.samples} times the same text",
                             where="--num-samples", fix="set --temperature, e.g. 0.8 as in the paper for many samples")
    if names == ["all"]:
        names = list(task_names())
    tasks = [load_task(name) for name in names]
    if len({item.name for item in tasks}) < len(tasks):
        raise ModelLinkError("a task is given twice", where="--task")
    for item in tasks:
        item.style(settings.style)
        if settings.chat:
            item.chat_style(settings.language)
    jobs = []
    for item in tasks:
        shots = functools.partial(item.shown, settings.style, language=settings.chat_language)
        subjects = read_subjects(item, folders, max_samples, shots)
        questions = [question for subject in subjects for question in make_questions(item, settings, subject)]
        jobs.append(Job(item, settings, subjects, questions))
    return jobs
