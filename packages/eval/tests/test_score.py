"""Accuracies against numbers worked out by hand."""

import math

import pytest

from modellink.eval.score import accuracy, choose, macro, per_byte, summarise


def test_the_most_likely_is_chosen_and_of_equals_the_first():
    assert choose([-3.0, -1.0, -2.0]) == 1
    assert choose([-2.0, -1.0, -1.0]) == 1


def test_per_byte_divides_by_the_bytes_without_the_blank():
    assert per_byte([-6.0, -6.0, -6.0], [" ab", "é", " 机器"]) == [-3.0, -3.0, -1.0]


def test_accuracy_and_its_standard_error():
    score = accuracy([True, True, True, False], [True, False, False, False])
    assert (score.questions, score.correct, score.accuracy, score.accuracy_per_byte) == (4, 3, 0.75, 0.25)
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3)) == 0.25  # 0.25 by hand
    assert accuracy([True], [True]).stderr is None
    assert accuracy([True] * 5, [True] * 5).stderr == 0


def test_micro_counts_questions_and_macro_counts_subjects():
    marks = {"large": [(True, True)] * 6 + [(False, True)] * 2, "small": [(False, False), (True, True)]}
    found = summarise(marks, "micro")
    assert found["micro"]["accuracy"] == found["accuracy"] == 0.7
    assert found["micro"]["stderr"] == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    assert found["macro"]["accuracy"] == 0.625
    # (0.75 * 0.25 / 7 + 0.5 * 0.5 / 1) ** 0.5 / 2
    assert found["macro"]["stderr"] == pytest.approx(0.26305214)
    assert summarise(marks, "macro")["accuracy"] == 0.625
    assert found["micro"]["accuracy_per_byte"] == 0.9


def test_macro_has_no_error_where_a_subject_has_one_question():
    assert macro([accuracy([True], [True]), accuracy([True, False], [True, False])]) == (0.75, None)
