# SPDX-License-Identifier: Apache-2.0
"""Choosing tokens: filters against a plain reference, random draws, seeds, penalties and limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.infer.sampler import Sampler, filter_logits, penalize
from modellink.infer.sampling import Sampling
from modellink.kernels.errors import ModelLinkError

CPU = torch.device("cpu")


def kept(logits: list[float], temperature: float, top_k: int, top_p: float) -> set[int]:
    """Return the tokens that the filters keep, computed only by sorting and summing."""
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    if top_k:
        order = order[:top_k]
    weights = [math.exp((logits[index] - logits[order[0]]) / temperature) for index in order]
    stay, before = set(), 0.0
    for index, weight in zip(order, weights, strict=True):
        if top_p < 1 and before / sum(weights) > top_p:
            break
        stay.add(index)
        before += weight
    return stay


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-400, 400), min_size=1, max_size=40, unique=True), st.floats(0.2, 3),
       st.integers(0, 45), st.floats(0.05, 1))
def test_the_filters_keep_what_a_plain_reference_keeps(scores, temperature, top_k, top_p):
    logits = torch.tensor(scores).double() / 50
    left = filter_logits(logits, Sampling(True, temperature, top_k, top_p))
    stay = {index for index, value in enumerate(left.tolist()) if value > -math.inf}
    assert stay == kept(logits.tolist(), temperature, top_k, top_p)
    chosen = sorted(stay)
    assert torch.equal(left[chosen], logits[chosen] / temperature)


def test_top_k_comes_before_top_p():
    # the first two of four tokens have 0.7 together; of these two, the first has 0.57 and crosses 0.5 by
    # itself
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (filter_logits(logits, Sampling(True, 1.0, 2, 0.5)) > -math.inf).tolist() == [True, False, False,
                                                                                         False]
    assert (filter_logits(logits, Sampling(True, 1.0, 0, 0.5)) > -math.inf).tolist() == [True, True, False,
                                                                                         False]


def test_the_most_likely_token_is_always_kept():
    assert (filter_logits(torch.tensor([0.9, 0.1]).log(),
                          Sampling(True, top_p=1e-9)) > -math.inf).tolist() == [True, False]


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    sampler = Sampler(Sampling(True, 1.0, 0, 1.0, seed=3), CPU)
    drawn = torch.tensor([sampler(probabilities.log()) for _ in range(4000)]).bincount(minlength=4) / 4000
    assert drawn.tolist() == pytest.approx(probabilities.tolist(), abs=0.03)


def test_samples_are_determined_by_the_seed():
    logits = torch.zeros(1000)
    draws = [[int(sampler(logits)) for _ in range(8)]
             for sampler in (Sampler(Sampling(True, seed=seed, top_k=0), CPU)
                                                                     for seed in (1, 1, 2))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(True, temperature=0.0)])
def test_greedy_takes_the_most_likely(sampling):
    assert int(Sampler(sampling, CPU)(torch.tensor([0.1, 3.0, 2.0]))) == 1


@pytest.mark.parametrize(("values", "name"), [
    ({"temperature": math.nan}, "temperature"), ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.inf}, "temperature"), ({"top_k": -1}, "top-k"), ({"top_p": 0.0}, "top-p"),
    ({"top_p": 1.5}, "top-p"), ({"top_p": math.nan}, "top-p"),
    ({"seed": -1}, "seed"), ({"min_p": 1.5}, "min-p"), ({"repetition_penalty": 0.0}, "repetition-penalty"),
    ({"presence_penalty": math.nan}, "presence-penalty"),
    ({"frequency_penalty": math.inf}, "frequency-penalty")])
def test_values_out_of_range_are_refused(values, name):
    with pytest.raises(ModelLinkError) as refusal:
        Sampling(True, **values)
    assert refusal.value.where == f"--{name}"


def test_min_p_and_repetition_penalty_equal_transformers():
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)) * 3
    for share in (0.01, 0.3, 1.0):
        expected = MinPLogitsWarper(share)(None, logits[None])[0]
        assert torch.equal(filter_logits(logits, Sampling(True, top_k=0, min_p=share)) > -math.inf,
                           expected > -math.inf)
    for penalty in (1.3, 0.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[3, 7, 7, 9, 11]]),
                                                             logits[None])[0]
        torch.testing.assert_close(penalize(logits, Sampling(repetition_penalty=penalty), [3, 7, 7], [9, 11]),
                                   expected)


def test_presence_and_frequency_penalties_count_only_the_completion():
    found = penalize(torch.zeros(6), Sampling(presence_penalty=1.0, frequency_penalty=0.25), [0, 1],
                     [1, 3, 3, 3])
    assert found.tolist() == [0, -1.25, 0, -1.75, 0, 0]
    assert penalize(torch.zeros(3), Sampling(presence_penalty=1.0), [0], []).tolist() == [0, 0, 0]


def test_a_penalty_changes_the_greedy_choice():
    sampler = Sampler(Sampling(presence_penalty=5.0), CPU, [2], answer := [1])
    assert sampler(torch.tensor([0.1, 3.0, 2.0])) == 2
    answer.append(2)
    assert sampler(torch.tensor([0.1, 3.0, 2.0])) == 0
