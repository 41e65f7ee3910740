# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of given texts against one pass of transformers."""

from __future__ import annotations

import pytest
import torch

from modellink.kernels.errors import ModelLinkError


def random_ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 379, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs() -> list[tuple[list[int], list[int]]]:
    """Return pairs of different lengths; the first five share a context."""
    shared = random_ids(0, 30)
    return [*((shared, [token]) for token in (7, 8, 9)), (shared, [7, 8]), (shared[:20], shared[20:]),
            *((random_ids(seed, 1 + 9 * seed), random_ids(50 + seed, 1 + seed % 4)) for seed in range(1, 9))]


def reference(full_logits, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logprobs = full_logits(context + continuation)[len(context) - 1:-1]
    greedy = logprobs.argmax(-1).tolist() == continuation
    return logprobs[range(len(continuation)), continuation].sum().item(), greedy


def check(engine, full_logits) -> None:
    found = engine.loglikelihood(pairs())
    expected = [reference(full_logits, *pair) for pair in pairs()]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_loglikelihoods_equal_transformers(engine, full_logits):
    check(engine, full_logits)


def test_loglikelihoods_if_the_logits_do_not_fit_into_one_pass(engine, full_logits, monkeypatch):
    monkeypatch.setattr("modellink.infer.score.MAX_PASS_LOGITS", 379 * 4)
    check(engine, full_logits)


def test_loglikelihoods_one_token_at_a_time(engine, full_logits, monkeypatch):
    monkeypatch.setattr("modellink.infer.score.MAX_PASS_TOKENS", 1)
    check(engine, full_logits)


def test_a_greedy_completion_is_greedy(engine):
    context = random_ids(3, 12)
    (completion,) = engine.generate(context, max_new_tokens=6, ignore_eos=True, logprobs=True)
    wrong = [*completion.token_ids[:-1], (completion.token_ids[-1] + 1) % 379]
    (right, greedy), (_, not_greedy) = engine.loglikelihood([(context, completion.token_ids),
                                                             (context, wrong)])
    assert (greedy, not_greedy) == (True, False)
    assert right == pytest.approx(sum(completion.logprobs), abs=1e-4)


def test_score_is_the_loss_of_each_token_after_the_first(engine, full_logits):
    windows = [random_ids(seed, length) for seed, length in enumerate((2, 40, 17, 40))]
    for window, losses in zip(windows, engine.score(windows), strict=True):
        expected = -full_logits(window)[range(len(window) - 1), window[1:]]
        assert losses == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_shared_context_is_computed_once(engine, computed):
    engine.loglikelihood([([5, 6, 7], [token]) for token in (10, 11, 12, 13)])
    assert computed == [3]


def test_a_common_prefix_is_computed_once(engine, full_logits, computed):
    prefix = random_ids(99, 150)
    pairs = [(prefix + random_ids(seed, 5 + seed), [seed + 3, 7]) for seed in range(8)]
    found = engine.loglikelihood(pairs)
    lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    first = lengths[min(range(len(pairs)), key=lambda number: pairs[number][0])]
    assert computed == [first, sum(lengths) - first - 7 * 128]
    again = engine.loglikelihood(pairs)
    assert [value for value, _ in again] == pytest.approx([value for value, _ in found], abs=1e-4)
    assert sum(computed[2:]) <= sum(lengths) - 8 * 128  # a later call shares the pages of an earlier one
    expected = [reference(full_logits, *pair) for pair in pairs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_the_maximum_length_can_be_scored(engine):
    ids = random_ids(1, 257)
    assert len(engine.score([ids])[0]) == 256
    with pytest.raises(ModelLinkError, match="pair 0 has 258 tokens"):
        engine.score([[*ids, 5]])


@pytest.mark.parametrize(("pair", "message"), [(([], [5]), "context 0 has no tokens"),
                                               (([5], []), "continuation 0 has no"),
                                               (([379], [5]), "token id 379")])
def test_invalid_pairs_are_refused(engine, pair, message):
    with pytest.raises(ModelLinkError, match=message):
        engine.loglikelihood([pair])
