# SPDX-License-Identifier: Apache-2.0
"""Which experts are chosen and what the balance losses are, against the formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modellink.ckpt_convert.spec import ModelSpec

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11, "num_experts": 6, "moe_router_topk": 2}
GROUPS = {"moe_router_num_groups": 3, "topk_group": 2}


def routed(values: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """On a rank: logits, scores, choice, losses."""
    from modellink.core import processes
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(), seed=1)
    from modellink.core.model.router import choose, group_losses

    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)) * 2
    spec = ModelSpec(**SIZES | values)
    scores, chosen = choose(logits, spec)
    losses = group_losses(logits.softmax(-1), chosen, spec) if spec.moe_router_num_groups else ()
    return logits, scores, chosen, *losses


@pytest.mark.parametrize("values", [
    {}, {"moe_router_pre_softmax": True}, {"moe_router_pre_softmax": True, "routed_scaling_factor": 2.5},
    {"moe_router_pre_softmax": True} | GROUPS, GROUPS], ids=["chosen", "all", "scaled", "groups", "groups, chosen"])
def test_the_choice_is_the_formula(pools, values):
    logits, scores, chosen, *_ = pools(1)(routed, values=values)[0]
    for token in range(5):
        allowed = set(range(6))
        if "topk_group" in values:  # the two groups whose best expert is best
            best = sorted(range(3), key=lambda group: -max(logits[token, 2 * group], logits[token, 2 * group + 1]))[:2]
            allowed = {expert for expert in range(6) if expert // 2 in best}
        experts = sorted(allowed, key=lambda expert: -logits[token, expert])[:2]
        assert set(chosen[token].nonzero().flatten().tolist()) == set(experts)
        among = range(6) if values.get("moe_router_pre_softmax") else experts
        total = sum(logits[token, expert].exp() for expert in among)
        for expert in range(6):
            share = logits[token, expert].exp() / total * values.get("routed_scaling_factor", 1.0)
            expected = share if expert in experts else 0.0
            assert scores[token, expert].item() == pytest.approx(float(expected), abs=1e-6)


def test_group_losses_are_those_of_the_report(pools):
    logits, _, chosen, device, communication = pools(1)(routed, values=GROUPS)[0]
    shares, tokens, k, groups, limit = logits.softmax(-1), 5, 2, 3, 2
    f = [6 / (k * tokens) * sum(bool(chosen[t, i]) for t in range(tokens)) for i in range(6)]
    p = [sum(float(shares[t, i]) for t in range(tokens)) / tokens for i in range(6)]
    first = sum((f[2 * d] + f[2 * d + 1]) / 2 * (p[2 * d] + p[2 * d + 1]) for d in range(groups))
    sent = [groups / (limit * tokens) * sum(bool(chosen[t, 2 * d] or chosen[t, 2 * d + 1]) for t in range(tokens))
            for d in range(groups)]
    second = sum(sent[d] * (p[2 * d] + p[2 * d + 1]) for d in range(groups))
    assert (device.item(), communication.item()) == (pytest.approx(first, rel=1e-5), pytest.approx(second, rel=1e-5))
