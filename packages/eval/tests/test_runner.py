# SPDX-License-Identifier: Apache-2.0
"""Runs: answers, journals, interruption."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from modellink.eval import Likelihood, evaluate, load_task
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.owner import owned

STYLES = ("original", "lm-eval")


def results(folder):
    """Return results.json without timings."""
    found = json.loads((folder / "results.json").read_text())
    del found["run"]
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def start(script):
    """Evaluate in a new process; keywords are environment variables."""
    def start(*args, **environment):
        return subprocess.Popen([sys.executable, str(script), *map(str, args)], env=os.environ | environment,
                                stderr=subprocess.DEVNULL)
    return start


@pytest.mark.parametrize("style", STYLES)
def test_scores_are_those_of_the_likelihoods(data, backend, style):
    found = evaluate(["mmlu", "boolq"], data, backend, prompt_style=style)
    by_context = {}
    for request in backend.asked:
        by_context.setdefault(request.context, []).append(request)
    assert len(by_context) == 14 + 9 + 10
    right = {"mmlu": 0, "boolq": 0}
    gold = gold_answers(data)
    for context, requests in by_context.items():
        likely = [backend.loglikelihood([request])[0].logprob for request in requests]
        answer = requests[likely.index(max(likely))].continuation.strip()
        right["boolq" if len(requests) == 2 else "mmlu"] += answer.upper()[0] == gold[context.split("\n")[-2 if len(
            requests) == 2 else -6]]
    for task, count in (("mmlu", 23), ("boolq", 10)):
        assert (found["tasks"][task]["micro"]["questions"], found["tasks"][task]["micro"]["correct"]) == (count, right[task])
        assert found["tasks"][task]["style"] == style
    assert 0 < right["mmlu"] < 23 and 0 < right["boolq"] < 10  # a model that is always right or wrong would prove little


def gold_answers(data):
    """Return the first letter of the answer by the line of the question."""
    import csv
    gold = {}
    for path in (data / "mmlu" / "test").iterdir():
        with path.open(newline="") as file:
            gold |= {row[0]: row[5] for row in csv.reader(file)}
    for row in lines(data / "boolq" / "dev.jsonl"):
        gold[f"Question: {row['question']}?"] = "Y" if row["answer"] else "N"
    return gold


def test_the_journal_has_a_header_and_a_line_a_question(data, backend, tmp_path):
    evaluate("mmlu", data, backend, tmp_path / "out", batch_size=4)
    header, *answers = lines(tmp_path / "out" / "mmlu.journal.jsonl")
    assert header == {"journal": 2, "task": "mmlu", "version": 1, "style": "original",
                      "model": {"name": "ngram", "fingerprint": "ngram-1"}}
    assert sorted((line["subject"], line["row"]) for line in answers) == [
        *(("old_cities", row) for row in range(1, 15)), *(("rivers", row) for row in range(1, 10))]
    assert all(len(line["logprobs"]) == 4 and max(line["logprobs"]) < 0 for line in answers)


def test_questions_of_a_subject_stand_together_the_longest_first(data, ngram):
    sizes = []

    class Watched(ngram.NgramBackend):
        def loglikelihood(self, requests):
            sizes.append([(request.context[:80], len(request.context)) for request in requests])
            return super().loglikelihood(requests)
    evaluate("mmlu", data, Watched(), batch_size=5)
    assert [len(batch) for batch in sizes] == [20, 20, 20, 20, 12]
    heads = [head for batch in sizes for head, _ in batch]
    assert heads == sorted(heads, key=lambda head: "rivers" in head)
    for head in set(heads):
        lengths = [length for batch in sizes for other, length in batch if other == head]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("point", ["after-batch", "before-results", "after-write"])
def test_a_run_killed_at_a_point_continues_to_the_same_results(data, backend, tmp_path, start, ngram, point):
    evaluate("mmlu", data, backend, tmp_path / "whole")
    out = tmp_path / "out"
    assert start("mmlu", data, out, "original", 3, MODELLINK_KILL_AT=point).wait() == -signal.SIGKILL
    assert not (out / "results.json").exists()
    again = ngram.NgramBackend()
    found = evaluate("mmlu", data, again, out, batch_size=7)
    answered = 23 - 3 if point == "after-batch" else 0
    assert (len(again.asked), found["run"]["mmlu"]["answered"]) == (answered * 4, answered)
    assert results(out) == results(tmp_path / "whole")
    assert len(lines(out / "mmlu.journal.jsonl")) == 24


@pytest.mark.parametrize(("task", "kills"), [
    ("mmlu", 2), ("gsm8k", 2), pytest.param("mmlu", 20, marks=pytest.mark.stress),
    pytest.param("gsm8k", 20, marks=pytest.mark.stress)])
def test_a_run_killed_at_random_moments_continues_to_the_same_results(data, backend, tmp_path, start, task, kills):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    evaluate(task, data, backend, tmp_path / "whole", prompt_style="lm-eval")
    journal = tmp_path / "out" / f"{task}.journal.jsonl"
    for kill in range(kills):
        process = start(task, data, tmp_path / "out", "lm-eval", 1 if kills > 2 else 2 + kill, 0.1)
        deadline = time.monotonic() + 60
        before = journal.stat().st_size if journal.exists() else 0
        while (journal.stat().st_size if journal.exists() else 0) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5 if kills == 2 else 0.1))
        process.kill()
        process.wait()
    assert start(task, data, tmp_path / "out", "lm-eval", 8).wait() == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert len(lines(journal)) == {"mmlu": 24, "gsm8k": 13}[task]


def test_a_written_answer_is_noted_as_soon_as_it_is_there(data, tmp_path, start, ngram):
    out = tmp_path / "out"
    assert start("gsm8k", data, out, "lm-eval", 32, MODELLINK_KILL_AT="after-batch").wait() == -signal.SIGKILL
    assert len(lines(out / "gsm8k.journal.jsonl")) == 2  # the header and the first one
    again = ngram.NgramBackend()
    found = evaluate("gsm8k", data, again, out, prompt_style="lm-eval")
    assert (len(again.asked), found["run"]["gsm8k"]["found answered"]) == (11, 1)
    evaluate("gsm8k", data, ngram.NgramBackend(), tmp_path / "whole", prompt_style="lm-eval")
    assert results(out) == results(tmp_path / "whole")


def test_an_answer_that_a_backend_leaves_out_is_no_wrong_one(data, ngram):
    class Lazy(ngram.NgramBackend):
        def generate(self, requests):
            yield from list(super().generate(requests))[2:]
    with pytest.raises(ModelLinkError, match="2 of 12 questions have no answer"):
        evaluate("gsm8k", data, Lazy())


def test_a_line_that_was_cut_off_is_answered_again(data, backend, tmp_path, ngram):
    evaluate("boolq", data, backend, tmp_path / "out")
    journal, before = tmp_path / "out" / "boolq.journal.jsonl", results(tmp_path / "out")
    journal.write_bytes(journal.read_bytes()[:-7])
    again = ngram.NgramBackend()
    evaluate("boolq", data, again, tmp_path / "out")
    assert len(again.asked) == 2 and results(tmp_path / "out") == before


def test_an_output_has_one_run(data, ngram, tmp_path):
    with owned(tmp_path / "out", inside=True), pytest.raises(ModelLinkError, match="is writing to this output"):
        evaluate("mmlu", data, ngram.NgramBackend(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_batch_size_gives_the_same_results(data, ngram, tmp_path):
    for size in (1, 3, 100):
        evaluate(["boolq", "mmlu"], data, ngram.NgramBackend(), tmp_path / str(size), batch_size=size)
    assert results(tmp_path / "1") == results(tmp_path / "3") == results(tmp_path / "100")


def test_more_questions_build_on_those_that_are_answered(data, ngram, tmp_path):
    evaluate("mmlu", data, ngram.NgramBackend(), tmp_path / "out", max_samples=4)
    more = ngram.NgramBackend()
    found = evaluate("mmlu", data, more, tmp_path / "out")
    assert len(more.asked) == 4 * (23 - 8)
    assert found["run"]["mmlu"]["found answered"] == 8 and found["tasks"]["mmlu"]["micro"]["questions"] == 23


def test_a_question_that_is_there_twice_is_asked_once_and_counted_twice(tmp_path, backend, write_jsonl):
    row = {"passage": "p", "question": "q", "answer": True}
    write_jsonl(tmp_path / "dev.jsonl", [row, row, row | {"answer": False}])
    found = evaluate("boolq", tmp_path, backend, tmp_path / "out")
    assert len(backend.asked) == 2 and len(lines(tmp_path / "out" / "boolq.journal.jsonl")) == 2
    assert found["tasks"]["boolq"]["micro"]["questions"] == 3
    assert found["tasks"]["boolq"]["micro"]["correct"] in (1, 2)


def test_tasks_of_one_model_share_a_folder(data, ngram, tmp_path):
    for task in ("mmlu", "boolq"):
        evaluate(task, data, ngram.NgramBackend(), tmp_path / "one-by-one")
    evaluate(["boolq", "mmlu"], data, ngram.NgramBackend(), tmp_path / "together")
    assert results(tmp_path / "one-by-one") == results(tmp_path / "together")


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt_style": "lm-eval"}, "answers of prompt style original, this run has lm-eval"),
    ({"model": "another"}, "answers of another model, name ngram, fingerprint ngram-1"),
    ({"task": "boolq", "model": "another"}, "results of another model"),
])
def test_another_models_or_styles_journal_is_refused_and_left_alone(data, ngram, tmp_path, snapshot, change, message):
    evaluate("mmlu", data, ngram.NgramBackend(), tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(ModelLinkError, match=message):
        evaluate(change.get("task", "mmlu"), data, ngram.NgramBackend(change.get("model", "ngram")), tmp_path / "out",
                 prompt_style=change.get("prompt_style", "original"))
    assert snapshot(tmp_path) == before


def test_another_task_version_is_refused(data, ngram, tmp_path):
    evaluate("mmlu", data, ngram.NgramBackend(), tmp_path / "out")
    journal = tmp_path / "out" / "mmlu.journal.jsonl"
    journal.write_text(journal.read_text().replace('"version": 1', '"version": 0', 1))
    with pytest.raises(ModelLinkError, match="task version 0"):
        evaluate("mmlu", data, ngram.NgramBackend(), tmp_path / "out")


def test_a_strange_file_in_the_journals_place_is_refused(data, backend, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mmlu.journal.jsonl").write_text("shopping list\nmilk\n")
    with pytest.raises(ModelLinkError, match="not a journal of modellink-eval"):
        evaluate("mmlu", data, backend, tmp_path / "out")


def test_a_likelihood_that_is_no_number_is_not_scored(data, ngram, tmp_path):
    class Broken(ngram.NgramBackend):
        def loglikelihood(self, requests):
            return [Likelihood(float("nan"), False) for _ in requests]
    with pytest.raises(ModelLinkError, match="nan") as caught:
        evaluate("boolq", data, Broken(), tmp_path / "out")
    assert "dev, row" in str(caught.value) and not (tmp_path / "out" / "results.json").exists()


def test_prompts_that_lost_their_beginning_are_counted(data, ngram):
    class Short(ngram.NgramBackend):
        def loglikelihood(self, requests):
            return [Likelihood(found.logprob, found.greedy, 3 if len(request.context) > 120 else 0)
                    for request, found in zip(requests, super().loglikelihood(requests), strict=True)]
    backend = Short()
    found = evaluate("boolq", data, backend)
    assert found["tasks"]["boolq"]["prompts_cut"] == len({ask.context for ask in backend.asked if len(ask.context) > 120}) > 0


def test_results_name_what_was_asked(data, backend):
    task = evaluate("boolq", data, backend, prompt_style="lm-eval")["tasks"]["boolq"]
    assert task["example"]["prompt"].startswith("France -- France is a country.") and task["example"]["right"] == "no"
    assert task["files"] == {"dev": str(data / "boolq" / "dev.jsonl")}
    assert (task["version"], task["shots"], task["score"]) == (load_task("boolq").version, 0, "likelihood of choices")


def test_a_task_of_your_own(tmp_path, backend, write_jsonl):
    write_jsonl(tmp_path / "data" / "mine.jsonl", [{"say": "ab", "answer": "x"}, {"say": "ba", "answer": "y"}])
    (tmp_path / "own.yaml").write_text(
        "name: own\nversion: 3\nsummary: mine\ndata: {reader: jsonl, files: ['*.jsonl'], columns: {say: text, answer: [x, y]}}\n"
        "styles: {original: {question: '{{ say }}=', choices: {x: ' x', y: ' y'}}}\n")
    found = evaluate(tmp_path / "own.yaml", tmp_path / "data", backend)
    assert found["tasks"]["own"]["micro"]["questions"] == 2
    assert [request.context for request in backend.asked] == ["ab=", "ab=", "ba=", "ba="]
