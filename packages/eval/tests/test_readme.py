# SPDX-License-Identifier: Apache-2.0
"""The README matches the package."""

import re
from pathlib import Path

from modellink.eval import load_task, task_names
from modellink.eval.options import RunOptions
from modellink.kernels.options import describe

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_options_table_is_the_options():
    assert describe(RunOptions) in README


def test_the_table_of_tasks_is_the_tasks():
    rows = re.findall(r"^\| (\w+) \| (.*) \| .* \| \[tasks/", README, re.MULTILINE)
    assert [name for name, _ in rows] == task_names()
    for name, files in rows:
        assert re.findall(r"`(.*?)`", files) == list(load_task(name).data.files)


def test_the_library_example_runs(tmp_path, monkeypatch, data, backend):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert 0 <= names["score"](backend) <= 1 and (tmp_path / "scores" / "results.json").is_file()
