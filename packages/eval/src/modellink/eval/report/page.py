# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page for one task: a bar for each subject, and the worst answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from modellink.eval.job import Job
from modellink.eval.prompts import Question
from modellink.eval.score import Mark
from modellink.kernels.files import atomic_write

WORST = 20
SHOWN = 3000  # characters shown of the end of a prompt

_TEMPLATE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% } td, th { padding: .15rem .5rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } .bar { width: 40%; min-width: 8rem }
.bar div { background: #2a6f97; height: .8rem }
.bar { background: linear-gradient(#eee, #eee) center/calc(100% - 1rem) .8rem no-repeat }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem } summary { cursor: pointer }
.total td { font-weight: bold; border-top: 1px solid #999 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } pre { background: #242424 }
.bar { background: linear-gradient(#333, #333) center/calc(100% - 1rem) .8rem no-repeat } }
</style></head><body>
<h1>{{ name }}: {{ percent(task.accuracy) }}{% if task.stderr is not none %} ± {{ percent(task.stderr) }}{% endif %}</h1>
<p>{{ task.micro.questions }} questions, {{ task.score }}, prompts: {{ task.style }}, {{ task.shots }} examples; headline:
{{ task.aggregation }}. {% if task.micro.unparsed %}<b>{{ task.micro.unparsed }} answers were not found in the generated text and
count as wrong.</b>{% endif %} {% if task.prompts_cut %}<b>{{ task.prompts_cut }} prompts were
truncated at the beginning.</b>{% endif %}</p><p>Model:
{% for key, value in model.items() if key != "versions" %}{{ key }} {{ value }}{{ "; " if not loop.last }}{% endfor %}
</p><table><tr><th>subject</th><th>questions</th><th>accuracy</th><th>± stderr</th><th>unparsed</th><th class="bar"></th></tr>
{% for label, score, kind in rows %}<tr class="{{ kind }}"><td>{{ label }}</td><td>{{ score.questions }}</td>
<td>{{ percent(score.accuracy) }}</td><td>{{ percent(score.stderr) if score.stderr is not none else "" }}</td>
<td>{{ score.unparsed }}</td>
<td class="bar"><div style="width: {{ "%.2f" | format(100 * score.accuracy) }}%"></div></td></tr>{% endfor %}</table>
<h2>Worst answers</h2><p>{{ explained }}</p>
{% for question, mark in worst %}<details><summary>{{ question.subject }}, row {{ question.row }}:
{{ "no answer found" if mark.unparsed else mark.answer[:80] }}, right is {{ mark.right[:80] }}
{%- if mark.margin is not none %} ({{ "%.2f" | format(-mark.margin) }} nats){% endif %}</summary>
<pre>{{ question.prompt[-shown:] }}</pre><p>answered</p><pre>{{ mark.answer }}</pre><p>right</p>
<pre>{{ mark.right }}</pre></details>
{% endfor %}</body></html>
""")


def write_page(path: Path, job: Job, marks: Sequence[Mark], results: Mapping[str, Any]) -> None:
    task = results["tasks"][job.task.name]
    rows = [*((name, score, "") for name, score in task["subjects"].items()),
            *((f"category: {name}", score, "total") for name, score in task["categories"].items()),
            ("all questions", task["micro"], "total")]
    worst = worst_questions(job.questions, marks)
    explained = "Wrong answers, the most confident first." if any(mark.margin is not None for _, mark in worst) else \
        "Wrong answers; those not found in the text first."
    with atomic_write(path, "w") as file:
        file.write(_TEMPLATE.render(name=job.task.name, task=task, model=results["model"], rows=rows, worst=worst, shown=SHOWN,
                                    explained=explained, percent=lambda value: f"{100 * value:.2f} %"))


def worst_questions(questions: Sequence[Question], marks: Sequence[Mark]) -> list[tuple[Question, Mark]]:
    """Return the wrong answers, sorted by the confidence of the model, or with those not found in the text first."""
    wrong = [(question, mark) for question, mark in zip(questions, marks, strict=True) if mark.score < 1]
    return sorted(wrong, key=lambda item: (item[1].margin or 0.0, not item[1].unparsed, item[1].score))[:WORST]
