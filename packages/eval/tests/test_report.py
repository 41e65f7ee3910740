# SPDX-License-Identifier: Apache-2.0
"""Reports of a run, and the comparison of two runs."""

import csv
import math

import pytest

from modellink.eval import evaluate
from modellink.eval.report.compare import compare, print_comparison, sign_test


def scores(*values, offset=0):
    return {("s", str(number + offset), "d"): float(value) for number, value in enumerate(values)}


def test_the_sign_test_is_a_fair_coin():
    assert sign_test(5, 5) == 1 and sign_test(0, 0) == 1
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(6, 0) == pytest.approx(2 / 64)


def test_the_same_questions_are_compared_one_by_one():
    found = compare(scores(1, 1, 0, 0, 1), scores(1, 0, 1, 1, 1, 1))
    assert (found.questions, found.better, found.worse, found.test) == (5, 2, 1, "McNemar, exact")
    assert (found.first, found.second, found.p) == (0.6, 0.8, 1.0)


def test_half_right_answers_and_other_questions_are_held_against_their_error():
    paired = compare(scores(0.5, 1, 0), scores(1, 1, 0.25))
    changes = (0.5, 0, 0.25)
    error = math.sqrt(sum((change - 0.25) ** 2 for change in changes) / 2 / 3)
    assert paired.test == "paired z" and paired.p == pytest.approx(math.erfc(0.25 / error / math.sqrt(2)))
    apart = compare(scores(*[1] * 60, *[0] * 40), scores(*[1] * 40, *[0] * 60, offset=1000))
    assert apart.test == "unpaired z" and apart.better is None
    assert apart.p == pytest.approx(math.erfc(0.2 / math.sqrt(2 * 0.24 / 99) / math.sqrt(2)))


def test_two_runs_side_by_side(command, data, ngram, tmp_path):
    found = evaluate(["mmlu", "boolq"], data, ngram.NgramBackend(), tmp_path / "one")
    other = evaluate("boolq", data, ngram.NgramBackend("other"), tmp_path / "two", prompt_style="lm-eval")
    done = command("report", tmp_path / "one" / "results.json", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if "boolq" in line and "McNemar" in line]
    assert all(f"{100 * results['tasks']['boolq']['accuracy']:.2f} %" in row for results in (found, other))
    assert "prompts differ, original and lm-eval" in done.stdout and "mmlu" not in done.stdout
    (tmp_path / "two" / "boolq.questions.csv").unlink()
    assert "questions file of a run is missing" in command("report", tmp_path / "one", tmp_path / "two").stderr


def test_headlines_stand_beside_the_means_that_are_compared(tmp_path, capsys):
    """Two subjects with different numbers of questions: macro and micro differ."""
    results = []
    for run, (large, small) in enumerate((((1, 1, 1, 0), (0,)), ((1, 1, 0, 0), (1,)))):
        folder = tmp_path / str(run)
        folder.mkdir()
        rows = [f"{number},{subject},{number},{score},0,,," for subject, marks in (("large", large), ("small", small))
                for number, score in enumerate(marks)]
        (folder / "exam.questions.csv").write_text("digest,subject,row,score,unparsed,margin,answer,right\n" + "\n".join(rows))
        macro = (sum(large) / 4 + sum(small)) / 2
        results.append({"tasks": {"exam": {"accuracy": macro, "style": "original", "version": 1 + run, "aggregation": "macro"}}})
    print_comparison(tmp_path / "0", tmp_path / "1", *results)
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if "McNemar" in line]
    assert "37.50 %, 75.00 %" in row and row.count("60.00 %") == 2 and "+0.00" in row
    assert "task versions differ, 1 and 2" in printed and "mean over subjects (macro)" in printed
    assert "unweighted means over the compared questions" in printed


def test_tables_for_programs_and_a_page_for_people(data, backend, tmp_path):
    rows = data / "mmlu" / "test" / "rivers_test.csv"
    rows.write_text(rows.read_text().replace("What is", "<script>What</script> is", 1))
    found = evaluate("mmlu", data, backend, tmp_path / "out")["tasks"]["mmlu"]
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        table = {row["subject"]: row for row in csv.DictReader(file)}
    assert float(table["rivers"]["accuracy"]) == found["subjects"]["rivers"]["accuracy"]
    assert float(table["(macro)"]["accuracy"]) == found["macro"]["accuracy"] and int(table["(micro)"]["questions"]) == 23
    with (tmp_path / "out" / "mmlu.questions.csv").open(newline="") as file:
        questions = list(csv.DictReader(file))
    assert sum(float(row["score"]) for row in questions) == found["micro"]["correct"]
    assert all((float(row["margin"]) > 0) == (row["answer"] == row["right"]) for row in questions)
    page = (tmp_path / "out" / "mmlu.html").read_text()
    assert "rivers" in page and "<script>" not in page and "http" not in page  # nothing from elsewhere, text stays text
    assert page.count("<details>") == min(20, 23 - found["micro"]["correct"])
    worst = min(questions, key=lambda row: float(row["margin"]))
    assert page.index(f"{worst['subject']}, row {worst['row']}:") < page.index("</details>")
