# SPDX-License-Identifier: Apache-2.0
"""Run an evaluation: answer the questions, record every answer in a journal, and write the results.

Results are computed only from the journals, so they do not depend on how often a run was interrupted.

Not here: models (backends/), scoring of answers (kinds/) and reports (report/).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modellink.eval.backends.backend import Backend
from modellink.eval.job import Job, prepare
from modellink.eval.journal import RESULTS, check_output, open_journal
from modellink.eval.kinds import kind_of
from modellink.eval.prompts import EvalSettings, Question
from modellink.eval.recorded import recorded_chat
from modellink.eval.report.write import write_reports
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark, summarize
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import kill_point, read_json, write_json
from modellink.kernels.owner import owned
from modellink.kernels.progress import Work

BATCH = 32


def evaluate(task: str | Path | Sequence[str | Path], data: Path | str | Sequence[Path | str], model: Backend | Path | str,
             output: Path | str | None = None, *, prompt_style: str = "original", settings: EvalSettings | None = None,
             batch_size: int = BATCH, max_samples: int | None = None, sandbox: Sandbox | None = None,
             show: bool = False) -> dict[str, Any]:
    """Score a model on one benchmark or several.

    Args:
        task: names of benchmarks, paths of task.yaml files, or `all`.
        data: folders with the data of the tasks.
        model: a checkpoint, which needs modellink-infer and runs in this process; or any Backend.
        output: folder for journals and results. Without it nothing is written and the run cannot be resumed.
        prompt_style: `original` or `lm-eval`; overridden by `settings`. Without `settings`, a checkpoint that was trained
            with a chat template is evaluated in chats.
        batch_size: multiple-choice questions per batch; generated answers are recorded one by one.
        max_samples: use only the first rows of each subject.
        sandbox: sandbox for generated programs; without it, tasks that need one are refused.
        show: show progress on stderr.

    Returns:
        The content of results.json; see the package's README.

    Raises:
        ModelLinkError: see `prepare` and `check_output`; or a likelihood is not a number.
    """
    if settings is None:
        settings = EvalSettings(prompt_style, recorded_chat(Path(model)) if isinstance(model, (str, Path)) else None)
    jobs = prepare(task, data, settings, max_samples)
    if isinstance(model, (str, Path)):
        from modellink.eval.backends.local import LocalBackend
        model = LocalBackend(model, chat=settings.chat)
        if output is not None:
            check_output(jobs, model.describe(), Path(output))
        model.load()
    return run(jobs, model, None if output is None else Path(output), batch_size=batch_size, sandbox=sandbox, show=show)


def run(jobs: Sequence[Job], backend: Backend, output: Path | None, *, batch_size: int = BATCH, sandbox: Sandbox | None = None,
        show: bool = False) -> dict[str, Any]:
    """Answer the remaining questions, and write and return the results."""
    if batch_size < 1:
        raise ModelLinkError(f"the batch size is {batch_size}, it must be at least 1", where="--evaluation-batch-size")
    check_sandbox(jobs, sandbox)
    model = dict(backend.describe())
    if output is not None:
        check_output(jobs, model, output)
    with nullcontext() if output is None else owned(output, inside=True):
        return _run(jobs, backend, model, output, batch_size, sandbox, show)


def _run(jobs: Sequence[Job], backend: Backend, model: Mapping[str, Any], output: Path | None, batch_size: int,
         sandbox: Sandbox | None, show: bool) -> dict[str, Any]:
    results: dict[str, Any] = {"modellink-eval": version("modellink-eval"), "model": model, "tasks": {}, "run": {}}
    if output is not None and (output / RESULTS).is_file():  # results of other tasks of the same model are kept
        results |= {part: read_json(output / RESULTS)[part] for part in ("tasks", "run")}
    for job in jobs:
        start = time.monotonic()
        answers, answered = _answer(job, backend, model, output, batch_size, sandbox, show)
        seconds = time.monotonic() - start
        marks = [kind_of(question).mark(question, answers[question.key(job.task)]) for question in job.questions]
        results["tasks"][job.task.name] = _result(job, answers, marks)
        results["run"][job.task.name] = {
            "seconds": round(seconds, 3), "answered": answered, "found answered": len(job.questions) - answered,
            "questions_per_second": round(answered / seconds, 3) if answered else None, "batch_size": batch_size}
        for part in ("tasks", "run"):
            results[part] = dict(sorted(results[part].items()))
        if output is not None:
            kill_point("before-results")
            write_reports(output, job, marks, results)
            write_json(output / RESULTS, results)
    return results


def check_sandbox(jobs: Sequence[Job], sandbox: Sandbox | None) -> None:
    """Raise ModelLinkError if a job runs generated programs but no sandbox is given."""
    for job in jobs:
        if job.runs_code and sandbox is None:
            raise ModelLinkError(f"{job.task.name} runs generated programs, which is not allowed", where="--task",
                                 fix="pass --allow-code-execution; the README documents the sandbox and its limits")


def _answer(job: Job, backend: Backend, model: Mapping[str, Any], output: Path | None, batch_size: int,
            sandbox: Sandbox | None, show: bool) -> tuple[dict[str, Any], int]:
    """Return the journal lines of all questions by key, and the number of questions answered in this run."""
    keys = [question.key(job.task) for question in job.questions]
    journal, answers = (None, {}) if output is None else open_journal(output, job, model)
    with journal or nullcontext():
        answered = sum(key not in answers for key in keys)
        todo = {key: question for key, question in zip(keys, job.questions, strict=True) if key not in answers}
        with Work(f"answering {job.task.name}", len(todo), unit="questions", show=show) as work:
            for batch in _batches(todo, batch_size):
                kind = kind_of(batch[0][1])
                found = kind.ask(backend, [question for _, question in batch], job.settings, sandbox)
                for part in [list(found)] if kind.TOGETHER else ([one] for one in found):
                    lines = [_line(*batch[number], answer) for number, answer in part]
                    if journal is not None:
                        journal.append(*lines)
                        kill_point("after-batch")
                    answers |= {line["key"]: line for line in lines}
                    work.advance(len(lines))
    return {key: answers[key] for key in keys}, answered


def _line(key: str, question: Question, answer: Mapping[str, Any]) -> dict[str, Any]:
    return {"key": key, "subject": question.subject, "row": question.row, **answer}


def _batches(todo: Mapping[str, Question], size: int) -> Iterator[Sequence[tuple[str, Question]]]:
    """Batch questions of one kind and subject, the longest first, so that a shared beginning is computed once.

    For a kind whose answers finish one by one, all questions are one batch, from which the backend starts the next request.
    """
    def order(item: tuple[str, Question]) -> tuple[Any, ...]:
        question = item[1]
        return kind_of(question).NAME, question.subject, -len(question.prompt)
    batch: list[tuple[str, Question]] = []
    for item in sorted(todo.items(), key=order):
        kind = kind_of(item[1])
        if batch and (kind is not kind_of(batch[0][1]) or (kind.TOGETHER and len(batch) == size)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _result(job: Job, answers: Mapping[str, Any], marks: Sequence[Mark]) -> dict[str, Any]:
    by_subject: dict[str, list[Mark]] = {subject.name: [] for subject in job.subjects}
    for question, mark in zip(job.questions, marks, strict=True):
        by_subject[question.subject].append(mark)
    example = job.questions[0]
    return {"version": job.task.version, "style": job.style,
            "shots": max(len(subject.examples) for subject in job.subjects),
            "score": ", ".join(sorted({kind_of(question).NAME for question in job.questions})),
            **summarize(by_subject, job.task),
            "prompts_cut": sum(answers[question.key(job.task)]["dropped"] > 0 for question in job.questions),
            "files": {subject.name: str(subject.path) for subject in job.subjects},
            "example": {"prompt": example.prompt, "choices": list(example.choices), "right": marks[0].right}}
