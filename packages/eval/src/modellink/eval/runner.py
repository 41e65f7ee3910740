"""Asking the questions, noting every answer, and the results.

`DIR/TASK.journal.jsonl` begins with a line that says what is evaluated and how; then comes one line per finished question,
filed under a digest of task version, prompt and choices. A run that was killed continues where it stopped, at another batch
size or layout too. `DIR/results.json` is made of the journals alone, so it holds the same scores however often a run was
interrupted.

Not here: what a model is (backends/) and what is shown (report.py).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink.eval.backends.backend import Backend, Likelihood
from modellink.eval.data import Subject, read_subjects
from modellink.eval.prompts import Question, make_questions
from modellink.eval.score import choose, per_byte, summarise
from modellink.eval.task import Style, Task, load_task
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import Journal, kill_point, read_json, write_json
from modellink.kernels.progress import Work

WINDOW = 16  # batches: questions are sorted by length inside a window, so that a batch needs little padding
RESULTS = "results.json"
FORMAT = 1


@dataclass(frozen=True)
class Job:
    """A task whose data is read and whose prompts are made."""

    task: Task
    style_name: str
    subjects: Sequence[Subject]
    questions: Sequence[Question]

    @property
    def style(self) -> Style:
        return self.task.style(self.style_name)

    def header(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The first line of its journal."""
        return {"journal": FORMAT, "task": self.task.name, "version": self.task.version, "style": self.style_name,
                "model": dict(model)}


def evaluate(task: str | Path | Sequence[str | Path], data: Path | str | Sequence[Path | str], model: Backend | Path | str,
             output: Path | str | None = None, *, prompt_style: str = "original", batch_size: int = 8,
             max_samples: int | None = None, show: bool = False) -> dict[str, Any]:
    """Score a model on one benchmark or several.

    Args:
        task: names of the package's benchmarks, or paths of your own task.yaml.
        data: folders in which each task looks for its files.
        model: a checkpoint, which needs modellink-infer and runs in this process; or any Backend.
        output: folder for journals and results.json; with none nothing is written and nothing can be continued.
        prompt_style: `original` or `lm-eval`.
        batch_size: questions that are computed and noted together.
        max_samples: the first rows of each subject only.
        show: show progress on stderr.

    Returns:
        What results.json holds; the package's README describes it.

    Raises:
        ModelLinkError: see `prepare` and `check_output`; a likelihood that is no number.
    """
    jobs = prepare(task, data, prompt_style, max_samples)
    if isinstance(model, (str, Path)):
        from modellink.eval.backends.local import LocalBackend
        model = LocalBackend(model)
        if output is not None:
            check_output(jobs, model.describe(), Path(output))
        model.load()
    return run(jobs, model, None if output is None else Path(output), batch_size=batch_size, show=show)


def prepare(task: str | Path | Sequence[str | Path], data: Path | str | Sequence[Path | str], prompt_style: str,
            max_samples: int | None) -> list[Job]:
    """Read tasks and data and make the prompts; nothing is computed or written.

    Raises:
        ModelLinkError: an unknown task or style, or data that is missing or broken.
    """
    names = [task] if isinstance(task, (str, Path)) else list(task)
    folders = [Path(folder) for folder in ([data] if isinstance(data, (str, Path)) else data)]
    if not names or not folders:
        raise ModelLinkError("a task and a folder with its data are needed", where="--task, --task-data-path")
    if max_samples is not None and max_samples < 1:
        raise ModelLinkError(f"{max_samples} questions of each subject were asked for", where="--max-eval-samples")
    tasks = [load_task(name) for name in names]
    if len({item.name for item in tasks}) < len(tasks):
        raise ModelLinkError("a task is named twice", where="--task")
    styles = [item.style(prompt_style) for item in tasks]
    jobs = []
    for item, style in zip(tasks, styles, strict=True):
        subjects = read_subjects(item, folders, max_samples)
        questions = [question for subject in subjects for question in make_questions(item, style, subject)]
        jobs.append(Job(item, prompt_style, subjects, questions))
    return jobs


def check_output(jobs: Sequence[Job], model: Mapping[str, Any], output: Path) -> None:
    """Raise unless these jobs can begin or continue in the folder; it is not touched.

    Raises:
        ModelLinkError: it holds answers of another model, style or task version.
    """
    if output.exists() and not output.is_dir():
        raise ModelLinkError("the output is a file", where=f"--output {output}", fix="name a folder")
    for job in jobs:
        path = _journal_path(output, job)
        header = _first_line(path)
        if header is not None:
            _refuse_other(header, job.header(model), path)
    results = output / RESULTS
    if results.is_file():
        found = read_json(results)
        theirs = found.get("model", {}) if isinstance(found, dict) else {}
        if theirs.get("fingerprint") != model["fingerprint"]:
            raise ModelLinkError(f"the folder holds results of another model, {_named(theirs)}", where=results,
                                 fix="choose another --output")


def run(jobs: Sequence[Job], backend: Backend, output: Path | None, *, batch_size: int = 8, show: bool = False,
        ) -> dict[str, Any]:
    """Answer what is not answered yet, and write and return the results."""
    if batch_size < 1:
        raise ModelLinkError(f"the batch size is {batch_size}, it must be at least 1", where="--evaluation-batch-size")
    model = dict(backend.describe())
    if output is not None:
        check_output(jobs, model, output)
        output.mkdir(parents=True, exist_ok=True)
    from modellink.eval import __version__
    results: dict[str, Any] = {"modellink-eval": __version__, "model": model, "tasks": {}, "run": {}}
    if output is not None and (output / RESULTS).is_file():  # other tasks of the same model keep their place
        results |= {part: read_json(output / RESULTS)[part] for part in ("tasks", "run")}
    for job in jobs:
        start = time.monotonic()
        answers, answered = _answer(job, backend, model, output, batch_size, show)
        seconds = time.monotonic() - start
        results["tasks"][job.task.name] = _result(job, answers)
        results["run"][job.task.name] = {
            "seconds": round(seconds, 3), "answered": answered, "found answered": len(job.questions) - answered,
            "questions_per_second": round(answered / seconds, 3) if answered else None, "batch_size": batch_size}
        for part in ("tasks", "run"):
            results[part] = dict(sorted(results[part].items()))
        if output is not None:
            kill_point("before-results")
            write_json(output / RESULTS, results)
    return results


def _answer(job: Job, backend: Backend, model: Mapping[str, Any], output: Path | None, batch_size: int, show: bool,
            ) -> tuple[dict[str, Any], int]:
    """The journal lines of all questions by key, and how many questions were answered now."""
    keys = [question.key(job.task) for question in job.questions]
    journal = Journal(_journal_path(output, job)) if output is not None else None
    with journal or nullcontext():
        answers: dict[str, Any] = {}
        if journal is not None:
            if not journal.entries:
                journal.append(job.header(model))
            answers = {entry["key"]: entry for entry in journal.entries[1:]}
        todo = list({key: question for key, question in zip(keys, job.questions, strict=True) if key not in answers}.items())
        answered = sum(key not in answers for key in keys)
        with Work(job.task.name, len(todo), unit="questions", show=show) as work:
            for batch in _batches(todo, batch_size):
                found = backend.loglikelihood([request for _, question in batch for request in question.requests()])
                lines = _lines(batch, found)
                if journal is not None:
                    journal.append(*lines)
                    kill_point("after-batch")
                answers |= {line["key"]: line for line in lines}
                work.advance(len(batch))
    return {key: answers[key] for key in keys}, answered


def _batches(todo: Sequence[tuple[str, Question]], size: int) -> Iterator[Sequence[tuple[str, Question]]]:
    for start in range(0, len(todo), WINDOW * size):
        window = sorted(todo[start:start + WINDOW * size], key=lambda item: len(item[1].prompt), reverse=True)
        yield from (window[at:at + size] for at in range(0, len(window), size))


def _lines(batch: Sequence[tuple[str, Question]], found: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """What goes into the journal for a batch; `found` has the choices of each question one after the other."""
    lines, rest = [], iter(found)
    for key, question in batch:
        mine = [next(rest) for _ in question.choices]
        if not all(math.isfinite(one.logprob) for one in mine):
            raise ModelLinkError(f"the likelihoods are {[one.logprob for one in mine]}",
                                 where=f"{question.subject}, row {question.row}",
                                 fix="look at the checkpoint: weights that are no numbers, or float16 that overflows?")
        lines.append({"key": key, "subject": question.subject, "row": question.row,
                      "logprobs": [one.logprob for one in mine], "greedy": [one.greedy for one in mine],
                      "dropped": max(one.dropped for one in mine)})
    return lines


def _result(job: Job, answers: Mapping[str, Any]) -> dict[str, Any]:
    marks: dict[str, list[tuple[bool, bool]]] = {subject.name: [] for subject in job.subjects}
    cut = 0
    for question in job.questions:
        answer = answers[question.key(job.task)]
        logprobs = answer["logprobs"]
        marks[question.subject].append((choose(logprobs) == question.gold,
                                        choose(per_byte(logprobs, question.choices)) == question.gold))
        cut += answer["dropped"] > 0
    example = job.questions[0]
    return {"version": job.task.version, "style": job.style_name, "shots": job.task.shots, "score": "likelihood of choices",
            **summarise(marks, job.task.aggregation), "prompts_cut": cut,
            "files": {subject.name: str(subject.path) for subject in job.subjects},
            "example": {"prompt": example.prompt, "choices": list(example.choices), "right": example.choices[example.gold]}}


def _journal_path(output: Path, job: Job) -> Path:
    return output / f"{job.task.name}.journal.jsonl"


def _first_line(path: Path) -> Any:
    """The header of a journal, or None where there is none or its writing was cut off."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _refuse_other(theirs: Any, ours: Mapping[str, Any], path: Path) -> None:
    if not isinstance(theirs, dict) or theirs.get("journal") != FORMAT:
        raise ModelLinkError("this is not a journal of ours", where=path, fix="choose another --output")
    said = {"task": "task", "version": "task version", "style": "prompt style"}
    for name, words in said.items():
        if theirs[name] != ours[name]:
            raise ModelLinkError(f"the folder holds answers of {words} {theirs[name]}, this run is of {ours[name]}", where=path,
                                 fix="choose another --output")
    if theirs["model"]["fingerprint"] != ours["model"]["fingerprint"]:
        raise ModelLinkError(f"the folder holds answers of another model, {_named(theirs['model'])}; "
                             f"this run is of {_named(ours['model'])}", where=path, fix="choose another --output")


def _named(model: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in model.items() if name != "versions") or "which it does not name"
