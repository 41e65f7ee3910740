# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: journals of answers, and the checks before a run may resume in it.

`DIR/TASK.journal.jsonl` begins with a header line with task, prompt style and model, followed by one line per finished question
with a digest of task version, prompt and choices as its key. A run that was killed resumes from it, also at another batch size or
layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.eval.job import FORMAT, Job
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import Journal, read_json

RESULTS = "results.json"


def check_output(jobs: Sequence[Job], model: Mapping[str, Any], output: Path) -> None:
    """Check that these jobs can start or resume in the folder, without modifying it.

    Raises:
        ModelLinkError: it contains answers of another model, style or task version.
    """
    if output.exists() and not output.is_dir():
        raise ModelLinkError("the output is a file", where=f"--output {output}", fix="give a folder")
    for job in jobs:
        path = _path(output, job)
        header = _first_line(path)
        if header is not None:
            _refuse_other(header, job.header(model), path)
    results = output / RESULTS
    if results.is_file():
        found = read_json(results)
        theirs = found.get("model", {}) if isinstance(found, dict) else {}
        if theirs.get("fingerprint") != model["fingerprint"]:
            raise ModelLinkError(f"the folder contains results of another model, {_named(theirs)}", where=results,
                                 fix="choose another --output")


def open_journal(output: Path, job: Job, model: Mapping[str, Any]) -> tuple[Journal, dict[str, Any]]:
    """Open the journal of a job, or start it; return it with its answers by key."""
    journal = Journal(_path(output, job))
    if not journal.entries:
        journal.append(job.header(model))
    return journal, {entry["key"]: entry for entry in journal.entries[1:]}


def _path(output: Path, job: Job) -> Path:
    return output / f"{job.task.name}.journal.jsonl"


def _first_line(path: Path) -> Any:
    """Return the header of a journal, or None if it is missing or incomplete."""
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
        raise ModelLinkError("the file is not a journal of modellink-eval", where=path, fix="choose another --output")
    said = {"task": "task", "version": "task version", "style": "prompt style"}
    for name, words in said.items():
        if theirs[name] != ours[name]:
            raise ModelLinkError(f"the folder contains answers of {words} {theirs[name]}, this run has {ours[name]}", where=path,
                                 fix="choose another --output")
    if theirs["model"]["fingerprint"] != ours["model"]["fingerprint"]:
        raise ModelLinkError(f"the folder contains answers of another model, {_named(theirs['model'])}; "
                             f"this run evaluates {_named(ours['model'])}", where=path, fix="choose another --output")


def _named(model: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in model.items() if name != "versions") or "without a name"
