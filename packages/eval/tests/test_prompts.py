# SPDX-License-Identifier: Apache-2.0
"""Prompts, character by character."""

from dataclasses import replace

import pytest

from modellink.eval import EvalSettings, Turn, load_task, task_names
from modellink.eval.data import Subject
from modellink.eval.prompts import make_questions
from modellink.eval.rows import Row
from modellink.eval.taskfile import parse_task
from modellink.kernels.errors import ModelLinkError


def mmlu_row(number, question, answer, choices=("w", "x", "y", "z")):
    return Row(number, dict(zip("ABCD", choices, strict=True)) | {"question": question, "answer": answer})


@pytest.fixture
def physics(tmp_path):
    examples = [mmlu_row(number, f"Question {number}?", "ABCDA"[number - 1]) for number in range(1, 6)]
    row = mmlu_row(1, " Is {{ this }} text? ", "C", ("1", "2, 3", "\"4\"", "é"))
    return Subject("college_physics", tmp_path, [row], [example.values for example in examples])


def test_mmlu_original(physics):
    task = load_task("mmlu")
    (question,) = make_questions(task, EvalSettings("original"), physics)
    assert question.prompt == (
        "The following are multiple choice questions (with answers) about  college physics.\n\n"
        "Question 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "Question 2?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "Question 3?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n"
        "Question 4?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n"
        "Question 5?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        " Is {{ this }} text? \nA. 1\nB. 2, 3\nC. \"4\"\nD. é\nAnswer:")
    assert question.choices == (" A", " B", " C", " D") and question.golds == (2,) and not question.alone


def test_mmlu_lm_eval(physics):
    task = load_task("mmlu")
    (question,) = make_questions(task, EvalSettings("lm-eval"), physics)
    assert question.prompt.startswith(
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        "Question 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\nQuestion 2?\n")
    assert question.prompt.endswith("Answer: A\n\nIs {{ this }} text?\nA. 1\nB. 2, 3\nC. \"4\"\nD. é\nAnswer:")
    assert question.choices == (" A", " B", " C", " D")


@pytest.fixture
def passage(tmp_path):
    values = {"passage": "Honey is sweet.", "question": "is honey sweet", "answer": True}
    return Subject("dev", tmp_path, [Row(1, values | {"title": "Honey"}), Row(2, values | {"title": "", "answer": False})], [])


def test_boolq_original(passage):
    task = load_task("boolq")
    first, second = make_questions(task, EvalSettings("original"), passage)
    assert first.prompt == second.prompt == "Honey is sweet.\nQuestion: is honey sweet?\nAnswer:"
    assert first.choices == ("Yes", "No") and first.alone
    assert (first.golds, second.golds) == ((0,), (1,))


def test_boolq_lm_eval(passage):
    task = load_task("boolq")
    first, second = make_questions(task, EvalSettings("lm-eval"), passage)
    assert first.prompt == "Honey -- Honey is sweet.\nQuestion: is honey sweet?\nAnswer:"
    assert second.prompt == "Honey is sweet.\nQuestion: is honey sweet?\nAnswer:"  # a row without a title
    assert first.choices == (" no", " yes") and not first.alone
    assert (first.golds, second.golds) == ((1,), (0,))


def test_a_key_changes_with_everything_an_answer_depends_on(physics):
    task = load_task("mmlu")
    (question,) = make_questions(task, EvalSettings("original"), physics)
    changes = [{"context": question.prompt + " "}, {"context": (Turn("user", question.prompt),)},
               {"choices": (" A", " B")}, {"alone": True}]
    keys = {type(question)(**vars(question) | change).key(task) for change in [{}, *changes]}
    keys.add(question.key(type(task)(**vars(task) | {"version": 2})))
    assert len(keys) == len(changes) + 2
    assert type(question)(**vars(question) | {"golds": (0,), "row": 9, "subject": "x"}).key(task) == question.key(task)


@pytest.mark.parametrize(("question", "message"), [
    ("{{ ''.__class__.__mro__ }}", "a template failed"), ("{{ qestion }}", "qestion")])
def test_a_template_cannot_reach_python_and_names_columns_that_are_there(physics, question, message):
    task = load_task("mmlu")
    style = replace(task.style("original"), question=question)
    with pytest.raises(ModelLinkError, match=message):
        list(make_questions(replace(task, styles={"original": (style,)}), EvalSettings(), physics))


YAML = """
name: mine
version: 1
summary: mine
data: {reader: jsonl, files: ["*.jsonl"], columns: {question: text, answer: [a, b]}}
styles: {original: {question: "{{ question }}", choices: {a: " a", b: " b"}}}
"""


@pytest.mark.parametrize(("old", "new", "message"), [
    ("version: 1", "version: 1\nshot: 3", "unknown key 'shot'"),
    ("summary: mine", "", "summary is missing"),
    ("reader: jsonl", "reader: xml", "reader is 'xml'"),
    ("question: text", "question: number", "column question has the unknown kind 'number'"),
    ('"{{ question }}"', '"{{ question }} "', "ends with white space"),
    ("version: 1", "version: 1\nshots: 2", "no examples file"),
    ("version: 1", "version: 1\naggregation: best", "aggregation is 'best'"),
    ("version: 1", "version: one", "version is 'one'"),
    ('choices: {a: " a", b: " b"}', "head: x", "needs either choices or generate"),
    ("styles:", "styles: [", "not YAML"),
])
def test_a_wrong_task_file_is_named(old, new, message):
    assert parse_task(YAML, "mine.yaml").name == "mine"
    with pytest.raises(ModelLinkError, match=message) as caught:
        parse_task(YAML.replace(old, new, 1), "mine.yaml")
    assert "mine.yaml" in str(caught.value)


def test_an_unknown_style_says_what_there_is():
    with pytest.raises(ModelLinkError, match="no prompt style 'chat'") as caught:
        load_task("mmlu").style("chat")
    assert "original, lm-eval" in str(caught.value)


def test_every_benchmark_has_both_styles():
    assert {"boolq", "mmlu"} < set(task_names())
    assert all(set(load_task(name).styles) == {"original", "lm-eval"} for name in task_names())
