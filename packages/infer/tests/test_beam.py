# SPDX-License-Identifier: Apache-2.0
"""Beam search against transformers, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import beside

from modellink.infer import load
from modellink.kernels.errors import ModelLinkError

MODELS = beside(str(Path(__file__).parents[2] / "core/tests/models.py"), "models")
PROMPTS = [torch.randint(3, 379, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (1, 4, 31, 50, 9)]


def reference(model, ids: list[int], count: int, **options: object) -> tuple[list[list[int]], list[float]]:
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0,
                             output_scores=True, return_dict_in_generate=True, **options)
    return [prompt[len(ids):].tolist() for prompt in out.sequences], out.sequences_scores.tolist()


def cut(tokens: list[int], stops: set[int]) -> list[int]:
    """Return the tokens without the padding of transformers."""
    return next((tokens[:index + 1] for index, token in enumerate(tokens) if token in stops), tokens)


@pytest.mark.parametrize("options", [
    {"num_beams": 4}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 2, "early_stopping": True}, {"num_beams": 5, "num_return_sequences": 3},
    {"num_beams": 3, "repetition_penalty": 1.3},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 3.0},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0}], ids=str)
@pytest.mark.parametrize("ends", [[2, 0], [5, 60, 120, 200, 222, 300, 333, 350]],
                         ids=["rare ends", "frequent ends"])
def test_beams_equal_transformers(engine, theirs, options, ends):
    for prompt in PROMPTS:
        expected, scores = reference(theirs, prompt, 12, eos_token_id=ends, **options)
        found = engine.generate([prompt], max_new_tokens=12, eos_token_id=ends, **options)
        assert [one.token_ids for one in found] == [cut(tokens, set(ends)) for tokens in expected]
        assert [one.score for one in found] == pytest.approx(scores, rel=1e-4, abs=1e-4)
    assert all(pool.used == 0 for pool in engine.cache.pools)


def test_requests_with_and_without_beams_in_one_call(engine):
    mixed = [engine.requests(PROMPTS[1], max_new_tokens=9)[0],
             engine.requests(PROMPTS[2], num_beams=2, num_return_sequences=2,
                                                                         max_new_tokens=9)[0]]
    completions = engine.complete(mixed)
    assert len(completions) == 3
    assert completions[:1] == engine.complete(mixed[:1]) and completions[1:] == engine.complete(mixed[1:])


def test_one_beam_is_greedy(engine):
    assert engine.generate([PROMPTS[3]], num_beams=1, max_new_tokens=9) == engine.generate([PROMPTS[3]],
                                                                                           max_new_tokens=9)


@pytest.mark.parametrize("early", [True, False, "never"])
def test_a_search_stops_when_transformers_stops(engine, theirs, early):
    """The prompt is one for which a longer search finds a better hypothesis."""
    ends = list(range(10, 370, 6))
    expected, scores = reference(theirs, PROMPTS[0], 30, eos_token_id=ends, num_beams=2, early_stopping=early)
    (found,) = engine.generate([PROMPTS[0]], max_new_tokens=30, eos_token_id=ends, num_beams=2,
                               early_stopping=early)
    assert found.token_ids == cut(expected[0], set(ends)) and found.score == pytest.approx(scores[0],
                                                                                           rel=1e-4)
    assert len(found.token_ids) == (30 if early == "never" else 5)


def test_alternatives_of_a_beam(engine, full_logits):
    prompt = PROMPTS[2]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "ignore_eos": True,
               "top_logprobs": 3}
    for completion in engine.generate([prompt], **options):
        expected_logprobs = full_logits([*prompt, *completion.token_ids])[len(prompt) - 1:-1]
        of_tokens = expected_logprobs[range(6), completion.token_ids].tolist()
        assert completion.logprobs == pytest.approx(of_tokens, abs=1e-4)
        for step, expected in zip(completion.top_logprobs, expected_logprobs, strict=True):
            values, ids = expected.topk(3)
            assert [token for token, _ in step] == ids.tolist()
            assert [value for _, value in step] == pytest.approx(values.tolist(), abs=1e-4)


def test_sampled_beams_follow_the_seed(engine):
    options = {"num_beams": 3, "do_sample": True, "temperature": 1.5, "max_new_tokens": 8}
    first, again, other = (engine.generate([PROMPTS[1]], seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_string_ends_a_beam(engine):
    text = engine.generate([PROMPTS[2]], num_beams=3, max_new_tokens=12, ignore_eos=True)[0].text
    stop = text[4:6]
    (completion,) = engine.generate([PROMPTS[2]], num_beams=3, max_new_tokens=12, ignore_eos=True, stop=stop)
    assert stop not in completion.text


@pytest.mark.parametrize(("options", "message"), [
    ({"num_beams": 0}, "0 is out of range"), ({"num_beams": 2, "num_return_sequences": 3},
                                              "2 beams cannot return 3"),
    ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
    ({"num_beams": 2, "length_penalty": float("nan")}, "nan is out of range"),
    ({"beams": 2}, "no argument beams")])
def test_invalid_arguments_are_refused(engine, options, message):
    with pytest.raises(ModelLinkError, match=message):
        engine.generate([PROMPTS[0]], **options)


def test_a_prompt_longer_than_the_pages_of_a_window(tmp_path, monkeypatch):
    name, sizes = MODELS.TRANSFORMERS["mistral window"]
    monkeypatch.setitem(MODELS.TRANSFORMERS, "long window", (name, sizes | {"max_position_embeddings": 512}))
    MODELS.make("long window", tmp_path)
    prompt = [number * 7 % 131 for number in range(300)]
    roomy, small = (load(tmp_path / "weights", device="cpu") for _ in range(2))
    small.__dict__["cache"] = small.network.make_cache(max_sequences=2, max_chunk=8, tokens=512)
    assert small.cache.pools[0].pages * 32 < len(prompt)
    options = {"num_beams": 2, "max_new_tokens": 6, "ignore_eos": True}
    assert small.generate([prompt], **options) == roomy.generate([prompt], **options)
    tiny = load(tmp_path / "weights", device="cpu")
    tiny.__dict__["cache"] = tiny.network.make_cache(max_sequences=2, max_chunk=256, tokens=256)
    with pytest.raises(ModelLinkError, match="2 beams of 306 tokens need"):
        tiny.generate([prompt], **options)


def test_too_many_beams_for_the_cache(llama, engine):
    small = type(engine).__new__(type(engine))
    small.__dict__ |= engine.__dict__ | {"cache": engine.network.make_cache(max_sequences=2, max_chunk=64,
                                                                            tokens=128)}
    with pytest.raises(ModelLinkError,
                       match="4 beams of 60 tokens need 256 tokens of cache, 128 are available"):
        small.generate([PROMPTS[3]], num_beams=4, max_new_tokens=10)
    with pytest.raises(ModelLinkError, match="cannot be streamed"):
        engine.stream(PROMPTS[0], num_beams=2)
