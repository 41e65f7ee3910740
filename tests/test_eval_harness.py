# SPDX-License-Identifier: Apache-2.0
"""modellink-eval against lm-evaluation-harness, if it is installed: the same prompts give the same numbers and texts.

The model classes of the harness, its Hugging Face class and ours, are called from Python, because its tasks would download data.
`benchmarks/eval.py` compares more questions with real weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink.eval import EvalSettings, GenerationRequest, LikelihoodRequest
from modellink.eval.backends.local import LocalBackend
from modellink.eval.job import prepare

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
DATA = Path(__file__).resolve().parent.parent / "examples" / "quickstart" / "eval-data"


@pytest.fixture(scope="module")
def models(eval_model: Path):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from modellink.eval.backends.harness import harness_model
    theirs = HFLM(pretrained=str(eval_model), device="cpu", dtype="float32", batch_size=2)
    return theirs, harness_model()(path=str(eval_model), device="cpu", dtype="float32")


def asked(kind: str, *args: object):
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, one, number) for number, one in enumerate(args)]


def test_likelihoods_are_the_harness_ones(models):
    theirs, ours = models
    jobs = prepare(["mmlu", "boolq"], DATA, EvalSettings("lm-eval"), 6)
    pairs = [(question.context, choice) for job in jobs for question in job.questions for choice in question.choices]
    # of a prompt that is too long the harness also cuts the token that the tokenizer puts first; we keep it
    pairs = [pair for pair in pairs if not ours.backend.encode(LikelihoodRequest(*pair)).dropped]
    assert len({len(choice) for _, choice in pairs}) > 1 and len(pairs) > 20
    pairs.append(("a context with a blank at its end ", "and more"))
    expected = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(asked("loglikelihood", *pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    direct = ours.backend.loglikelihood([LikelihoodRequest(*pair) for pair in pairs[:8]])
    assert [one.logprob for one in direct] == pytest.approx([value for value, _ in expected[:8]], abs=1e-3)


def test_rolling_likelihoods_are_the_harness_ones(models):
    theirs, ours = models
    texts = [("short",), (" ".join(f"word {number}" for number in range(400)),)]  # the second is longer than the model's sequence
    expected = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) == pytest.approx(expected, abs=1e-2)


def test_texts_are_the_harness_ones(models):
    theirs, ours = models
    questions = [question for job in prepare("boolq", DATA, EvalSettings("lm-eval"), 3) for question in job.questions]
    options = {"until": ["\n", "th"], "max_gen_toks": 24, "do_sample": False}
    args = [(question.context, options) for question in questions]
    expected = theirs.generate_until(asked("generate_until", *args), disable_tqdm=True)
    assert ours.generate_until(asked("generate_until", *args)) == expected
    backend: LocalBackend = ours.backend
    found = dict(backend.generate([GenerationRequest(context, ("\n", "th"), 24) for context, _ in args]))
    assert [found[number].text for number in range(len(args))] == expected
