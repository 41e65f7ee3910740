# SPDX-License-Identifier: Apache-2.0
"""The benchmarks with generated answers: prompts character by character on small sets, extraction, chats, and the real sets."""

import csv
import gzip
import json
import re

import pytest

from modellink.eval import Completion, EvalSettings, Turn, evaluate, load_task, task_names
from modellink.eval.job import prepare
from modellink.eval.kinds import mathtext, texts
from modellink.kernels.errors import ModelLinkError


def questions(task, folder, style="original", **more):
    (job,) = prepare(task, folder, EvalSettings(style, **more))
    return job.questions


COT = """A warning.
-----
Say what it is.

Q: 1 + 1 is
(A) 2
(B) 3
A: Let's think step by step.
One and one are two, the answer is known. So the answer is (A).

Q: 2 is
A: Let's think step by step. So the answer is two.
"""


@pytest.fixture
def bbh(tmp_path):
    (tmp_path / "bbh").mkdir()
    (tmp_path / "cot-prompts").mkdir()
    (tmp_path / "bbh" / "snarks.json").write_text(json.dumps({"canary": "x", "examples": [
        {"input": "3 is\n(A) three", "target": "(A)"}, {"input": "4 is", "target": "four"}]}))
    (tmp_path / "bbh" / "other.json").write_text(json.dumps({"examples": [{"input": "of another set", "target": "x"}]}))
    (tmp_path / "cot-prompts" / "snarks.txt").write_text(COT)
    return tmp_path


@pytest.mark.parametrize("name", task_names())
def test_categories_hold_each_subject_once(name):
    task = load_task(name)
    grouped = [subject for subjects in task.categories.values() for subject in subjects]
    assert len(grouped) == len(set(grouped))
    if grouped and task.data.subjects:
        assert sorted(grouped) == sorted(task.data.subjects)


def test_bbh_original_shows_answers_alone(bbh):
    first, _ = questions("bbh", bbh)
    assert first.prompt == "Say what it is.\n\nQ: 1 + 1 is\n(A) 2\n(B) 3\nA: (A)\n\nQ: 2 is\nA: two\n\nQ: 3 is\n(A) three\nA:"
    assert texts.mark(first, {"texts": [" A"]}).score == 1 and texts.mark(first, {"texts": [" (A)"]}).score == 1
    assert texts.mark(first, {"texts": [" (B)"]}).score == 0 and texts.mark(first, {"texts": [" "]}).unparsed


def test_bbh_lm_eval_shows_thoughts(bbh):
    first, second = questions("bbh", bbh, "lm-eval")
    assert first.prompt == (
        "Say what it is.\n\nQ: 1 + 1 is\n(A) 2\n(B) 3\nA: Let's think step by step.\nOne and one are two, the answer is known. "
        "So the answer is (A).\n\nQ: 2 is\nA: Let's think step by step.\nSo the answer is two.\n\n"
        "Q: 3 is\n(A) three\nA: Let's think step by step.\n")
    assert texts.mark(first, {"texts": ["Well, the answer is (A)."]}).score == 1
    assert texts.mark(second, {"texts": ["Well, the answer is four"]}).answer == "fou"  # the harness drops the last character
    assert texts.mark(second, {"texts": ["four"]}).unparsed


def test_bbh_prompts_that_are_no_such_thing_are_named(bbh):
    (bbh / "cot-prompts" / "snarks.txt").write_text(COT.replace("So the answer is two.", "two"))
    with pytest.raises(ModelLinkError, match="no reasoning that ends") as caught:
        questions("bbh", bbh)
    assert "snarks.txt, example 2" in str(caught.value)


AGIEVAL = [("sat-math", {"passage": "", "question": "1 + 1?", "options": ["(A)1", "(B)2"], "label": "B", "other": None}),
           ("gaokao-physics", {"passage": None, "question": "光？", "options": ["(A)波", "(B)粒"], "label": ["A", "B"],
                               "answer": None}),
           ("math", {"passage": None, "question": "Half?", "options": None, "label": None, "answer": "\\frac{1}{2}"})]


@pytest.fixture
def agieval(tmp_path, write_jsonl):
    for name, row in AGIEVAL:
        write_jsonl(tmp_path / "v1" / f"{name}.jsonl", [row])
    samples = [repr(AGIEVAL[0][1]), repr(AGIEVAL[1][1]), json.dumps(AGIEVAL[2][1])]
    with (tmp_path / "few_shot_prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["", *(name for name, _ in AGIEVAL)], ["sample 1", *samples],
                                    ["explanation 1", "w", "x", "y"],
                                    ["sample 2", "", "", samples[2]], ["explanation 2", "", "", "z"]])
    return tmp_path


def test_agieval_original(agieval):
    physics, maths, sat = questions("agieval", agieval)
    ask = "1 + 1?\n\nChoose from the following options:\n\n(A)1\n(B)2\n\nAnswer:"
    assert sat.prompt == f"Here are the answers for the problems in the exam.\nProblem 1.   {ask} B\n\nProblem 2.   {ask}"
    assert maths.prompt.endswith("Problem 2.   Half?\n\nAnswer: \\frac{1}{2}\n\nProblem 3.   Half?\n\nAnswer:")
    ask = "光？\n\n从以下选项中选择:\n\n(A)波\n(B)粒\n\n答案："
    assert physics.prompt == f"以下是考试中各个问题的答案。\n问题 1.   {ask}A,B\n\n问题 2.   {ask}"
    for text, score in (("A,B", 1), ("AB", 1), (" (A)(B)", 1), ("A、B。", 1), ("A", 0), ("A,B,C", 0)):
        assert texts.mark(physics, {"texts": [text]}).score == score, text
    assert texts.mark(sat, {"texts": [" B. 2"]}).score == 1 and texts.mark(sat, {"texts": ["$B$"]}).score == 1
    assert texts.mark(sat, {"texts": [" Because"]}).unparsed and texts.mark(sat, {"texts": [" 2"]}).unparsed


def test_agieval_lm_eval(agieval):
    physics, maths, sat = questions("agieval", agieval, "lm-eval")
    assert sat.prompt == "Q: 1 + 1? Answer Choices: (A)1 (B)2\nA: Among A through B, the answer is"
    assert (sat.choices, sat.golds) == ((" (A)1", " (B)2"), (1,))
    assert physics.prompt == "问题：光？ 选项：(A)波 (B)粒\n答案：从A到B, 我们应选择" and physics.golds == (0, 1)
    assert maths.prompt == "Q: Half?\nA: The answer is"
    assert all(texts.mark(maths, {"texts": [text]}).score == 1 for text in (" $\\dfrac12$", " \\frac{1}{2}.", " 1/2\nQ"))
    assert texts.mark(maths, {"texts": [" hm"]}).unparsed


@pytest.mark.parametrize(("style", "shots"), [("original", 2), ("lm-eval", 0)])
def test_examples_that_are_not_shown_are_not_counted_nor_needed(agieval, backend, style, shots):
    if not shots:
        (agieval / "few_shot_prompts.csv").unlink()
    found = evaluate("agieval", agieval, backend, prompt_style=style)["tasks"]["agieval"]
    assert found["shots"] == shots


def test_the_examples_of_a_style_are_counted(data, backend):
    for style, shots in (("original", 3), ("lm-eval", 8)):
        assert evaluate("gsm8k", data, backend, prompt_style=style)["tasks"]["gsm8k"]["shots"] == shots


def test_a_row_whose_answer_has_no_number_is_named(data, write_jsonl):
    path = write_jsonl(data / "gsm8k" / "test.jsonl", [{"question": "q", "answer": answer} for answer in ("One.\n#### 1", "5")])
    for style in ("original", "lm-eval"):
        with pytest.raises(ModelLinkError, match="the right answer is missing") as caught:
            questions("gsm8k", data, style)
        assert f"{path}, row 2" in str(caught.value)


def test_an_answer_that_is_no_option_is_named(agieval, write_jsonl):
    path = write_jsonl(agieval / "v1" / "sat-math.jsonl", [AGIEVAL[0][1], AGIEVAL[0][1] | {"label": "E"}])
    with pytest.raises(ModelLinkError, match="label is 'E', it must be one of A, B") as caught:
        questions("agieval", agieval, "lm-eval")
    assert f"{path}, row 2" in str(caught.value)


@pytest.mark.parametrize(("one", "two"), [("\\dfrac{1}{2}", "\\frac12"), ("0.5", "1/2"), ("\\sqrt3", "\\sqrt{3}"), ("x=5", "5"),
                                          ("10\\%", "10"), ("90^\\circ", "90"), (".25", "0.25"), ("3\\text{ cm}", "3"),
                                          ("\\left( 1, 2 \\right)", "(1,2)")])
def test_spellings_that_mean_the_same(one, two):
    assert mathtext.same(one, two) and not mathtext.same(one, two + "7")


@pytest.mark.parametrize(("text", "answer"), [
    ("so \\boxed{x = \\frac{1}{2}} and", "\\frac{1}{2}"), ("it is $y = 3$.", "3"), ("a = b = 4.", "4"), ("12 or 13 apples", "13"),
    ("none", None), ("\\boxed{", None)])
def test_where_a_mathematical_answer_stands(text, answer):
    assert mathtext.find_answer(text) == answer


def test_gsm8k_in_both_styles(data):
    lm_eval, original = (questions("gsm8k", data, style)[0] for style in ("lm-eval", "original"))
    assert lm_eval.prompt.count("Q: ") == 9 and lm_eval.prompt.endswith(
        "The answer is 8.\n\nQ: Ann has 0 apples. How many are left?\nA:") and lm_eval.target == "0"
    assert original.prompt.count("Q: ") == 3 and original.prompt.endswith("39.\n\nAnn has 0 apples. How many are left?")
    mark = texts.mark(lm_eval, {"texts": [" 7. The answer is 0. Or 5"]})
    assert (mark.score, mark.answer, mark.also) == (1, "0.", {"flexible-extract": 0})
    assert texts.mark(original, {"texts": [" The answer is $1,200 now."]}).answer == "1,200"
    assert texts.same("1,200", "1200", original.generate) and texts.same("$1,200.", "1200", lm_eval.generate)


def test_written_answers_are_scored_counted_and_listed(data, backend, tmp_path):
    found = evaluate("gsm8k", data, backend, tmp_path / "out", prompt_style="lm-eval")["tasks"]["gsm8k"]
    right = unparsed = 0
    for number, request in enumerate(list(backend.asked)):
        said = re.search(r"The answer is (\d)", dict(backend.generate([request]))[0].text)
        unparsed += said is None
        gold = re.search(r"Ann has (\d+)", request.context[request.context.rindex("Q:"):])
        right += said is not None and int(said[1]) == int(gold[1]) % 5
        assert request.until == ("Q:", "</s>", "<|im_end|>") and number < 12
    assert (found["micro"]["correct"], found["micro"]["unparsed"]) == (right, unparsed)
    assert 0 < right < 12 and 0 < unparsed < 12
    with (tmp_path / "out" / "gsm8k.questions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["unparsed"]) for row in rows) == unparsed and all(
        row["answer"] == "no idea" for row in rows if row["unparsed"] == "1")


def test_in_a_chat_examples_are_turns(data):
    first, *_ = questions("mmlu", data / "mmlu", chat="qwen")
    assert [turn.role for turn in first.context] == ["user", "assistant"] * 5 + ["user"]
    assert first.context[0].text.startswith(
        "The following are multiple choice questions (with answers) about old cities.\n\nWhat is")
    assert first.context[1].text in "ABCD" and first.choices == ("A", "B", "C", "D")
    assert first.context[2].text.startswith("What is") and first.context[-1].text.endswith("\nAnswer:")
    chinese, *_ = questions("mmlu", data / "mmlu", chat="qwen", language="zh")
    assert chinese.context[0].text.startswith("以下是中国关于old cities考试") and chinese.context[-1].text.endswith("\n答案：")
    boolq, *_ = questions("boolq", data, "lm-eval", chat="qwen")
    assert boolq.context == (Turn("user", questions("boolq", data, "lm-eval")[0].prompt),) and boolq.choices == ("no", "yes")


def test_a_chat_is_another_way_to_ask(data, ngram, tmp_path):
    class Chatty(ngram.NgramBackend):
        def loglikelihood(self, requests):
            return super().loglikelihood([request._replace(context=request.context[-1].text) for request in requests])
    found = evaluate("boolq", data, Chatty(), tmp_path / "out", settings=EvalSettings(chat="qwen"))
    assert found["tasks"]["boolq"]["style"] == "original, chat qwen en"
    with pytest.raises(ModelLinkError, match="prompt style original, chat qwen en"):
        evaluate("boolq", data, ngram.NgramBackend(), tmp_path / "out")


HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def one():\n    \"\"\"One.\"\"\"\n", "entry_point": "one",
             "test": "def check(candidate):\n    assert candidate() == 1\n", "canonical_solution": "    return 1\n"}


class Coder:
    """A backend that generates a right program and a wrong one in turn."""

    def describe(self):
        return {"fingerprint": "coder"}

    def generate(self, requests):
        return [(number, Completion(f"    return {1 + request.seed % 2}\n")) for number, request in enumerate(requests)]


def test_programs_are_run_only_where_that_is_allowed(tmp_path):
    from modellink.eval import Sandbox
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL) + "\n")
    with pytest.raises(ModelLinkError, match="runs generated programs") as caught:
        evaluate("humaneval", tmp_path, Coder(), tmp_path / "out")
    assert "--allow-code-execution" in str(caught.value) and not (tmp_path / "out").exists()
    found = evaluate("humaneval", tmp_path, Coder(), tmp_path / "out", sandbox=Sandbox("none"),
                     settings=EvalSettings("lm-eval", samples=4, temperature=0.8))["tasks"]["humaneval"]
    assert found["accuracy"] == 0.5 and found["micro"]["also"] == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6),
                                                                     "pass@4": 1}
    (line,) = (tmp_path / "out" / "humaneval.journal.jsonl").read_text().splitlines()[1:]
    assert json.loads(line)["outcomes"] == ["passed", "failed: AssertionError"] * 2
    with pytest.raises(ModelLinkError, match="3 times the same text"):
        evaluate("humaneval", tmp_path, Coder(), settings=EvalSettings(samples=3), sandbox=Sandbox("none"))


COUNTS = {"agieval": (8, 2925), "bbh": (27, 6511), "boolq": (1, 3270), "ceval": (5, 104), "gsm8k": (1, 1319),
          "humaneval": (1, 164), "mmlu": (6, 916)}


@pytest.mark.parametrize("style", ["original", "lm-eval"])
def test_all_tasks_find_their_real_sets_in_one_folder(real_data, style):
    assert list(COUNTS) == task_names()
    jobs = prepare("all", real_data, EvalSettings(style))
    assert {job.task.name: (len(job.subjects), len(job.questions)) for job in jobs} == COUNTS
    for job in jobs:
        assert all(question.golds or question.target for question in job.questions)


def test_targets_are_right_by_their_own_rules(real_data):
    """A text with the right answer is marked right, for every question of the real sets."""
    say = {"gsm8k": "So. The answer is {}.", "bbh": "the answer is {}."}
    for style in ("original", "lm-eval"):
        for job in prepare(["gsm8k", "bbh", "agieval"], real_data, EvalSettings(style)):
            form = say[job.task.name] if (style, job.task.name) not in (("original", "bbh"),) and job.task.name in say else "{}"
            marks = [(question, texts.mark(question, {"texts": [form.format(question.target)]}))
                     for question in job.questions if question.generate]
            wrong = [(question.subject, question.row, question.target, mark.answer) for question, mark in marks if not mark.score]
            assert marks and not wrong, wrong[:5]
