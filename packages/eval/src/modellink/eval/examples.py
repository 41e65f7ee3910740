# SPDX-License-Identifier: Apache-2.0
"""Solved examples: the first rows of a dev file, samples in the task's own file, or the prompts that came with a paper.

- `bbh-prompts` (github.com/suzgunmirac/BIG-Bench-Hard, `cot-prompts/`): a warning and a line `-----`, a description of the task,
  then `Q: ...` and `A: Let's think step by step.` with the reasoning, which ends with `the answer is X.`; columns `input`,
  `thoughts` and `target`.
- `agieval-prompts` (github.com/ruixiangcui/AGIEval, `few_shot_prompts.csv`): a column per subject, rows `sample N` with a row of
  the set as a Python or JSON literal, and rows `explanation N`; columns of the set, and `explanation`.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.eval.rows import read_rows, read_text
from modellink.eval.task import Examples, Layout, Task
from modellink.kernels.errors import ModelLinkError

Found = tuple[Sequence[Mapping[str, Any]], str]
STEPS = re.compile(r"\nA: Let's think step by step\.\s")  # sports_understanding continues on the same line


def read_examples(task: Task, subject: str, path: Path, shots: int) -> Found:
    """Return at most `shots` examples of a subject, and the introduction before them.

    Raises:
        ModelLinkError: the file is missing or broken, or has too few examples.
    """
    source = task.examples
    if not shots or source is None:
        return [], ""
    if source.file is None:
        return source.samples[:shots], ""
    place = _find(source, subject, path)
    found, about = _READERS[source.reader](place, subject, task.data)
    # a dev file must have the requested number of rows; the prompts of a paper may have fewer
    if not found or (source.reader == "rows" and len(found) < shots):
        raise ModelLinkError(f"{len(found)} rows, {task.name} needs {shots} examples", where=place)
    return found[:shots], about


def _find(source: Examples, subject: str, path: Path) -> Path:
    pattern = Path(str(source.file).replace("*", subject))
    places = [top / name for top in (path.parent, path.parent.parent) for name in (pattern.name, pattern)]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise ModelLinkError(f"the examples of {subject} are missing", where=path,
                             fix=f"put {pattern.name} into {places[-1].parent}")
    return place


def _rows(place: Path, subject: str, layout: Layout) -> Found:
    return [row.values for row in read_rows(place, layout)], ""


def _bbh(place: Path, subject: str, layout: Layout) -> Found:
    text = read_text(place, layout)
    about, *parts = re.split(r"\n\n(?=Q: )", text.partition("-----\n")[2].strip())
    examples = []
    for number, part in enumerate(parts, 1):
        question, *thoughts = STEPS.split(part.removeprefix("Q: "), maxsplit=1)
        answer = re.search(r".*the answer is (.*)\.", thoughts[0], re.DOTALL) if thoughts else None
        if answer is None:
            raise ModelLinkError("an example has no reasoning that ends with `the answer is X.`",
                                 where=f"{place}, example {number}")
        examples.append({"input": question, "thoughts": thoughts[0], "target": answer[1]})
    return examples, about


def _agieval(place: Path, subject: str, layout: Layout) -> Found:
    subject = "sat-en" if subject == "sat-en-without-passage" else subject  # the paper uses the same examples for it
    rows = list(csv.DictReader(io.StringIO(read_text(place, layout), newline="")))
    if not rows or subject not in rows[0]:
        raise ModelLinkError(f"the column {subject} is missing", where=place)
    examples = []
    for sample, explanation in zip(rows[::2], rows[1::2], strict=False):
        if not sample[subject].strip():
            continue
        where = f"{place}, {sample['']}, column {subject}"
        values = _literal(sample[subject], where)
        missing = {"question", "options", "label"} - set(values)
        if missing:
            raise ModelLinkError(f"{', '.join(sorted(missing))} is missing", where=where)
        label = values["label"] or []
        examples.append({"passage": values.get("passage") or "", "question": values["question"],
                         "options": values["options"] or [], "label": label if isinstance(label, list) else [label],
                         "answer": values.get("answer") or "", "explanation": explanation[subject]})
    return examples, ""


def _literal(text: str, where: str) -> dict[str, Any]:
    """Parse a row written by Python's repr or as JSON; both contain only strings, lists and None."""
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found = None
    if not isinstance(found, dict):
        raise ModelLinkError("not a row written as a Python or JSON object", where=where)
    return found


_READERS = {"rows": _rows, "bbh-prompts": _bbh, "agieval-prompts": _agieval}
