# SPDX-License-Identifier: Apache-2.0
"""Marks and accuracies, against numbers computed by hand."""

import math

import pytest

from modellink.eval import EvalSettings, load_task
from modellink.eval.kinds import programs
from modellink.eval.kinds.choices import choose, per_character
from modellink.eval.kinds.programs import complete, pass_at_k
from modellink.eval.score import Mark, accuracy, macro, summarize


def marks(*scores):
    return [Mark(float(score), "", "") for score in scores]


def test_the_most_likely_choice_is_taken_and_of_equals_the_first():
    assert choose([-3.0, -1.0, -2.0]) == 1 and choose([-1.0, -1.0]) == 0


def test_per_character_divides_by_what_is_said_without_blanks():
    assert per_character([-6.0, -6.0], [" ab", " abc"]) == [-3.0, -2.0]
    assert per_character([-6.0], [" é中"]) == [-3.0]


def test_accuracy_and_its_standard_error():
    score = accuracy([Mark(1.0, "", "", also={"x": 1.0}), *(Mark(1.0, "", "", also={"x": 0.0}) for _ in range(2)),
                      Mark(0.0, "", "", unparsed=True, also={"x": 0.0})])
    assert (score.questions, score.correct, score.accuracy, score.also, score.unparsed) == (4, 3, 0.75, {"x": 0.25}, 1)
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3)) == 0.25  # 0.25 by hand
    assert accuracy(marks(1)).stderr is None and accuracy(marks(*[1] * 5)).stderr == 0
    assert accuracy(marks(0.5, 1)).correct == 1.5


def test_micro_counts_questions_and_macro_counts_subjects():
    task = load_task("mmlu")
    found = summarize({"anatomy": marks(*[1] * 6, 0, 0), "virology": marks(0, 1)}, task)
    assert found["micro"]["accuracy"] == found["accuracy"] == 0.7
    assert found["micro"]["stderr"] == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    assert found["macro"]["accuracy"] == 0.625
    # (0.75 * 0.25 / 7 + 0.5 * 0.5 / 1) ** 0.5 / 2
    assert found["macro"]["stderr"] == pytest.approx(0.26305214)
    assert {name: score["questions"] for name, score in found["categories"].items()} == {"stem": 8, "other": 2}
    assert summarize({"aqua-rat": marks(1, 0), "math": marks(0)}, load_task("agieval"))["accuracy"] == 0.25  # headline: macro


def test_macro_has_no_error_where_a_subject_has_one_question():
    assert macro([accuracy(marks(1)), accuracy(marks(1, 0))]) == (0.75, None)


def test_pass_at_k_is_the_share_of_choices_of_k_with_one_that_passes():
    assert pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 2) == pytest.approx(0.5) and pass_at_k(4, 4, 3) == 1
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10) and pass_at_k(3, 0, 3) == 0


def test_a_program_is_the_prompt_and_what_follows_or_the_block_of_a_chat():
    assert complete("def f():\n", "    return 1\n", chat=False) == "def f():\n    return 1\n"
    names = {}
    exec(complete('import math\ndef f():\n    """Doc."""\n', "Sure:\n```python\ndef f():\n    return math.pi\n```\nDone.",
                  chat=True), names)
    assert names["f"]() == math.pi


@pytest.mark.parametrize(("text", "chat"), [
    ("    return a + b\n```\n", False), ("    return a + b\n```\nThis adds.\n```python\nf(1, 2)\n```", False),
    ("```python\ndef f(a, b):\n    return a + b\n```\nIt adds.", False), ("    return a + b\n```\n", True),
    ("It is\n```\n    return a + b\n```", True)])
def test_a_fence_ends_a_program_and_begins_one_in_a_chat_or_at_the_beginning(text, chat):
    names = {}
    exec(complete("def f(a, b):\n", text, chat=chat), names)
    assert names["f"](1, 2) == 3


def test_pass_at_the_number_of_samples_is_always_there():
    found = programs.mark(None, {"outcomes": ["failed: x", "passed", "failed: x"], "texts": ["", "", ""]})
    assert found.also == pytest.approx({"pass@1": 1 / 3, "pass@2": 2 / 3, "pass@3": 1})


def test_a_label_names_what_matters_to_the_task():
    settings = EvalSettings("lm-eval", max_new_tokens=9, samples=3, temperature=0.8)
    assert settings.label(written=False, programs=False) == "lm-eval"
    assert settings.label(written=True, programs=False) == "lm-eval, at most 9 tokens, temperature 0.8, top-p 1, seed 0"
    assert "3 samples, temperature 0.8" in settings.label(written=True, programs=True)
