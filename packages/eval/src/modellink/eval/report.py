"""Results on the terminal: a table for each task, and the line the original prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modellink.eval.runner import RESULTS
from modellink.eval.task import load_task, task_names
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json


def read_results(folder: Path) -> dict[str, Any]:
    """What `results.json` in a folder holds.

    Raises:
        ModelLinkError: there is none, or it is not ours.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ModelLinkError("there are no results", where=path, fix="name a folder that was the --output of a run that ended")
    results = read_json(path)
    if not isinstance(results, dict) or not {"modellink-eval", "model", "tasks", "run"} <= set(results):
        raise ModelLinkError("this is not a results file of ours", where=path)
    return results


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """A table and a line for each task, on stdout."""
    console = console or Console()
    for name, task in results["tasks"].items():
        console.print(_table(name, task, results["run"][name]))
        if task["prompts_cut"]:
            console.print(f"{task['prompts_cut']} prompts were too long for the model and lost their beginning", style="bold")
        console.print(original_line(name, task), soft_wrap=True, markup=False, highlight=False)


def original_line(name: str, task: Mapping[str, Any]) -> str:
    """`mmlu acc = 12/40=0.3`, the line of the original's log, which scripts look for."""
    micro = task["micro"]
    return f"{name} acc = {micro['correct']}/{micro['questions']}={micro['accuracy']}"


def _table(name: str, task: Mapping[str, Any], run: Mapping[str, Any]) -> Table:
    speed = f", {run['questions_per_second']:,.1f} questions/s" if run["questions_per_second"] else ""
    found = f", {run['found answered']} answered before" if run["found answered"] else ""
    table = Table(title=f"{name}, style {task['style']}, {task['shots']} examples", title_justify="left",
                  caption=f"{run['seconds']:,.1f} s{speed}{found}", caption_justify="left")
    table.add_column("subject")
    for heading in ("questions", "right", "accuracy", "± stderr"):
        table.add_column(heading, justify="right")
    for row in _rows(task):
        table.add_row(*row)
    return table


def _rows(task: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for subject, score in task["subjects"].items():
        yield subject, str(score["questions"]), str(score["correct"]), *_percent(score)
    if len(task["subjects"]) > 1:
        macro, micro = task["macro"], task["micro"]
        yield ()
        yield "macro: mean of subjects", "", "", *_percent(macro)
        yield "micro: all questions", str(micro["questions"]), str(micro["correct"]), *_percent(micro)


def _percent(score: Mapping[str, Any]) -> tuple[str, str]:
    error = score["stderr"]
    return f"{100 * score['accuracy']:.2f} %", "" if error is None else f"{100 * error:.2f}"


def print_tasks(console: Console | None = None) -> None:
    """The benchmarks there are, on stdout."""
    table = Table(title="benchmarks", title_justify="left")
    for heading in ("task", "version", "styles", "examples", "files"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is")
    for name in task_names():
        task = load_task(name)
        files = ", ".join([*task.data.files, *([task.examples] if task.examples else [])])
        table.add_row(name, str(task.version), ", ".join(task.styles), str(task.shots), files, task.summary)
    (console or Console()).print(table)
