# SPDX-License-Identifier: Apache-2.0
"""docs/your-own-task.md: its two tasks run as written and print what it shows, and its table matches the dataclasses."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

from modellink.eval import Completion, Likelihood, evaluate
from modellink.eval.cli import run_tasks
from modellink.eval.report.terminal import print_results
from modellink.eval.task import Examples, Extraction, Generate, Layout, Style, Task

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "your-own-task.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:3]
PLACES = {Task: "the file", Layout: "`data`", Examples: "`examples`", Style: "each of `styles` and `chat`",
          Generate: "`generate`", Extraction: "each of `extract`"}


class Knowing:
    """A backend that knows the answers of the page."""

    def describe(self):
        return {"fingerprint": "knowing"}

    def loglikelihood(self, requests):
        return [Likelihood(-1.0 if one.continuation in (" Paris", " Rome") else -9.0, False) for one in requests]

    def generate(self, requests):
        for number, one in enumerate(requests):
            assert "How many are left?\nAnswer: The answer is 3.\n\nQuestion: " in one.context
            yield number, Completion(" The answer is 5." if "Ann" in one.context else " 6 + 6 is 12.")


@pytest.mark.parametrize("section", SECTIONS, ids=["choices", "text"])
def test_a_task_of_the_page_runs_and_prints_what_is_shown(section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    data, task = re.findall(r"`([\w/]+\.(?:jsonl|yaml))`", section)
    Path(data).parent.mkdir()
    Path(data).write_text(blocks["json"], encoding="utf-8")
    Path(task).write_text(blocks["yaml"], encoding="utf-8")
    words = blocks["console"].removeprefix("$ modellink-eval run ").split()
    given = run_tasks.make_context("run", words).params
    assert given["task"] == (task,)
    results = evaluate(list(given["task"]), "data", Knowing(), given["output"])
    print_results(results)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if "questions/s" not in line]
    assert printed == blocks["text"].splitlines()


def default(field):
    if field.default is dataclasses.MISSING:
        return "needed" if field.default_factory is dataclasses.MISSING else ""
    text = json.dumps(field.default).strip('"')  # a line's end as YAML writes it
    return "" if field.default in (None, "", ()) else f"`{text}`"


def rows():
    """Yield the lines of the table of keys; the meaning of a field is in the docstring of its class."""
    yield from ("| in | key | default | meaning |", "| --- | --- | --- | --- |")
    for cls, place in PLACES.items():
        said = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(cls), re.MULTILINE))
        for field in dataclasses.fields(cls):
            yield f"| {place} | `{field.name}` | {default(field)} | {' '.join(said[field.name].split())} |"


def test_the_table_of_keys_is_what_the_dataclasses_say():
    assert "\n".join(rows()) in PAGE
