# SPDX-License-Identifier: Apache-2.0
"""The router of a mixture of experts: which experts see a token, and the load-balancing losses.

ModelSpec selects the top k of all experts or of the top groups, and a softmax over all or over the chosen experts. The losses are
megatron-core's (per micro batch or per sequence) and, for grouped experts, DeepSeek-V2's balance of computation and communication
between groups (arXiv:2405.04434, section 2.1.4).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec


def choose(logits: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Scores of the chosen experts (0 elsewhere) and a mask of the choice, both [tokens, experts], from logits of that shape.

    A group is ranked by its best expert.
    """
    all_scores = logits.float().softmax(-1)
    candidates = all_scores
    if spec.moe_router_num_groups and spec.topk_group:
        best = all_scores.unflatten(-1, (spec.moe_router_num_groups, -1)).amax(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(spec.topk_group, sorted=False).indices, 1.0)
        candidates = all_scores * kept.repeat_interleave(all_scores.size(-1) // best.size(-1), -1)
    index = candidates.topk(spec.moe_router_topk).indices
    scores = all_scores.gather(-1, index) if spec.moe_router_pre_softmax else logits.float().gather(-1, index).softmax(-1)
    scores = (scores * spec.routed_scaling_factor).to(logits.dtype)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
    return torch.zeros_like(logits).scatter(-1, index, scores), chosen


def group_losses(all_scores: Tensor, chosen: Tensor, spec: ModelSpec, ranks: Any = None) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's device-level and communication balance losses (equations 26 to 31), without their coefficients.

    Args:
        all_scores, chosen: [tokens, experts].
        ranks: process group that the tokens are sharded across; each rank returns its share of the losses.
    """
    groups = spec.moe_router_num_groups or 1  # D
    counts = torch.cat([chosen.sum(0), chosen.unflatten(-1, (groups, -1)).any(-1).sum(0)]).float()
    tokens = chosen.size(0)  # T
    if ranks is not None and ranks.size() > 1:
        torch.distributed.all_reduce(counts, group=ranks)
        tokens *= ranks.size()
    selected, touched = counts.split([chosen.size(1), groups])
    used = (chosen.size(1) * selected / (spec.moe_router_topk * tokens)).unflatten(0, (groups, -1)).mean(-1)  # f' of a group
    sent = groups * touched / ((spec.topk_group or groups) * tokens)  # f''
    share = (all_scores.sum(0) / tokens).unflatten(0, (groups, -1)).sum(-1)  # P'
    return (used * share).sum(), (sent * share).sum()


class Router(TopKRouter):
    """megatron-core's router with our `choose`."""

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection)
        self.spec: ModelSpec = config.spec
        self.balance = config.balance

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [seq, batch, experts] -> scores and mask of the choice, both [tokens, experts]."""
        seq, batch = logits.shape[:2]
        logits = self.apply_z_loss(logits.view(-1, logits.size(-1)))
        scores, chosen = choose(logits, self.spec)
        wanted = chosen  # balance is measured before tokens are dropped
        if (factor := self.balance.capacity_factor) is not None:
            scores, chosen = apply_router_token_dropping(
                scores, chosen, self.topk, factor, drop_policy=self.balance.moe_token_drop_policy,
                pad_to_capacity=self.balance.moe_pad_expert_input_to_capacity)
        if self.training and torch.is_grad_enabled():
            all_scores = logits.float().softmax(-1)
            scores = self._apply_aux_loss(scores, all_scores, wanted)
            scores = self._apply_seq_aux_loss(scores, all_scores, wanted, seq, batch)
            scores = self._apply_group_losses(scores, all_scores, wanted)
        return scores, chosen

    def _apply_group_losses(self, scores: Tensor, all_scores: Tensor, chosen: Tensor) -> Tensor:
        factors = (self.balance.moe_device_level_aux_loss_coeff, self.balance.moe_comm_aux_loss_coeff)
        if not any(factors) or not self.spec.moe_router_num_groups:
            return scores
        names = ("device_level_loss", "communication_loss")
        losses = group_losses(all_scores, chosen, self.spec, self.tp_cp_group)
        for name, factor, loss in zip(names, factors, losses, strict=True):
            if factor:
                scores = self.attach_and_log_load_balancing_loss(scores, factor, factor * loss, name, self.tp_cp_group)
        return scores
