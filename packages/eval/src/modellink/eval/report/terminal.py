# SPDX-License-Identifier: Apache-2.0
"""Print results on the terminal: a table for each task, and the line the original prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modellink.eval.journal import RESULTS
from modellink.eval.taskfile import load_task, task_names
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json
from modellink.kernels.tables import print_table

FORMAT = {"modellink-eval", "model", "tasks", "run"}


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json, given by its path or its folder.

    Raises:
        ModelLinkError: the file is missing or is not a results file.
    """
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ModelLinkError("no results were found", where=path, fix="give the --output folder of a finished run")
    results = read_json(path)
    if not isinstance(results, dict) or not set(results) >= FORMAT:
        raise ModelLinkError("the file is not a results file of modellink-eval", where=path)
    return results


def print_results(results: Mapping[str, Any]) -> None:
    """Print a table and a line for each task."""
    for name, task in results["tasks"].items():
        _print_task(name, task, results["run"][name])
        if task["prompts_cut"]:
            print(f"{task['prompts_cut']} prompts were too long and were truncated at the beginning")
        if task["micro"]["unparsed"]:
            print(f"{task['micro']['unparsed']} answers were not found in the generated text and count as wrong; they "
                  f"are marked in {name}.questions.csv")
        for rule, value in task["micro"]["also"].items():
            print(f"{name} {rule}: {100 * value:.2f} %")
        print(original_line(name, task), flush=True)


def original_line(name: str, task: Mapping[str, Any]) -> str:
    """Return `mmlu acc = 12/40=0.3`, the line of the original's log, which scripts search for."""
    micro = task["micro"]
    return f"{name} acc = {micro['correct']}/{micro['questions']}={micro['accuracy']}"


def _print_task(name: str, task: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    numbers = ("questions", "right", "accuracy", "± stderr", "unparsed")
    print_table(("subject", *numbers), _rows(task), title=f"{name}, style {task['style']}, {task['shots']} examples",
                right=numbers, wrap="subject")
    speed = f", {run['questions_per_second']:,.1f} questions/s" if run["questions_per_second"] else ""
    found = f", {run['found answered']} answered by an earlier run" if run["found answered"] else ""
    print(f"{run['seconds']:,.1f} s{speed}{found}")


def _rows(task: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for subject, score in task["subjects"].items():
        yield subject, *_counts(score)
    if task["categories"]:
        yield ()
    for category, score in task["categories"].items():
        yield f"category {category}", *_counts(score)
    if len(task["subjects"]) > 1:
        yield ()
        yield "macro: mean of subjects", "", "", *_percent(task["macro"]), ""
        yield "micro: all questions", *_counts(task["micro"])


def _counts(score: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(score["questions"]), f"{score['correct']:g}", *_percent(score), str(score["unparsed"] or ""))


def _percent(score: Mapping[str, Any]) -> tuple[str, str]:
    error = score["stderr"]
    return f"{100 * score['accuracy']:.2f} %", "" if error is None else f"{100 * error:.2f}"


def print_tasks() -> None:
    """Print the list of benchmarks."""
    rows = []
    for name in task_names():
        task = load_task(name)
        shots = {task.shots if style.shots is None else style.shots for styles in task.styles.values() for style in styles}
        rows.append((name, task.version, ", ".join(task.styles), " or ".join(map(str, sorted(shots))), task.data.files[0],
                     task.summary))
    print_table(("task", "version", "styles", "examples", "files", "description"), rows,
                optional=("version", "styles", "examples", "files"))
