# SPDX-License-Identifier: Apache-2.0
"""Attention over a block of the keys of a longer sequence, which ring attention combines with `ring_update`,
and its gradients.

The queries of a block see all of its keys or, if both are the same chunk of the sequence, the earlier ones. A
block has no window, cap, bias or documents: with those the scores depend on its position in the sequence
(attention.scores_of).

The gradients only need a block's share of the full softmax, exp(score - log-sum-exp over all blocks): a
kernel that gets the full result and log-sum-exp computes them block by block (as in flash attention, Dao et
al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modellink.kernels.ops.attention import Variant, compressed_causal_mask
from modellink.kernels.ops.dispatch import form_of


def supports(query: Tensor, value: Tensor, variant: Variant) -> bool:
    """Return whether this op computes blocks of these heads in this variant."""
    plain_scores = variant.window is None and variant.softcap is None and variant.slopes is None and variant.documents is None
    return plain_scores and not variant.dropout and query.size(-1) == value.size(-1)


def attention_block(query: Tensor, key: Tensor, value: Tensor, scale: float, *,
                    causal: bool) -> tuple[Tensor, Tensor]:
    """Return softmax(query key^T * scale) value over the keys of a block, and its log-sum-exp.

    Args:
        query: [seq, batch, heads, dim].
        key, value: [key seq, batch, groups, dim].
        causal: query i sees keys 0 .. i of the block.

    Returns:
        [seq, batch, heads, dim] in fp32, and [seq, batch, heads], the logarithm of the sum of exponentiated
        scores.
    """
    forward, _ = form_of("attention_block", query.device.type, FORMS, (plain, plain_gradients))
    out, lse = forward(query, key, value, scale, causal=causal)
    return out.float(), lse


def attention_block_gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
                              lse: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block's part of the gradients of query, key and value, in their shapes and fp32.

    Args:
        gradient, out: [seq, batch, heads, dim] of attention over all blocks.
        lse: [seq, batch, heads] log-sum-exp over all blocks.
    """
    _, backward = form_of("attention_block", query.device.type, FORMS, (plain, plain_gradients))
    of_query, of_key, of_value = backward(gradient, query, key, value, out, lse, scale, causal=causal)
    return of_query.float(), of_key.float(), of_value.float()


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, scale, causal)
    lse = scores.logsumexp(-1)
    values = _per_head(value, query.size(2)).float()
    return ((scores - lse.unsqueeze(-1)).exp() @ values).permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def plain_gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                    scale: float, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups, heads = key.size(2), query.size(2)
    upstream = gradient.float().permute(1, 2, 0, 3)
    weights = (_scores(query, key, scale, causal) - lse.permute(1, 2, 0).unsqueeze(-1)).exp()
    of_out = (upstream * out.float().permute(1, 2, 0, 3)).sum(-1, keepdim=True)
    of_scores = weights * (upstream @ _per_head(value, heads).float().transpose(-1, -2) - of_out) * scale
    of_query = (of_scores @ _per_head(key, heads).float()).permute(2, 0, 1, 3)
    of_key = of_scores.transpose(-1, -2) @ query.float().permute(1, 2, 0, 3)
    return of_query, _per_group(of_key, groups), _per_group(weights.transpose(-1, -2) @ upstream, groups)


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """Return the scores [batch, heads, seq, key seq] in fp32."""
    q, k = query.permute(1, 2, 0, 3), _per_head(key, query.size(2))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if not causal:
        return scores
    return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat groups per head: [seq, batch, groups, dim] -> [batch, heads, seq, dim]."""
    return x.permute(1, 2, 0, 3).repeat_interleave(heads // x.size(2), dim=1)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """Sum over the heads of each group: [batch, heads, seq, dim] -> [seq, batch, groups, dim]."""
    summed: Tensor = x.unflatten(1, (groups, -1)).sum(2)
    return summed.permute(2, 0, 1, 3)


def cpu(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    k, v = (_per_head(x, query.size(2)) for x in (key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.permute(1, 2, 0, 3), k, v, 0.0, causal, scale=scale)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def cpu_gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                  scale: float, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups, heads = key.size(2), query.size(2)
    upstream, whole = (x.to(query.dtype).permute(1, 2, 0, 3) for x in (gradient, out))
    of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        upstream, query.permute(1, 2, 0, 3), _per_head(key, heads), _per_head(value, heads), whole,
        lse.permute(1, 2, 0).contiguous(), 0.0, causal, scale=scale)
    return of_query.permute(2, 0, 1, 3), _per_group(of_key, groups), _per_group(of_value, groups)


def npu(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    out, largest, total = torch.ops.npu.npu_fusion_attention(
        q, k, v, q.size(2), "BSND", scale=scale, keep_prob=1.0, **_seen(query, causal))[:3]
    return out.transpose(0, 1), (largest[..., 0] + total[..., 0].log()).permute(2, 0, 1)


def npu_gradients(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                  scale: float, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pass the log-sum-exp to the fused op as the maximum of the scores, with a sum of one."""
    q, k, v, upstream, whole = (x.to(query.dtype).transpose(0, 1).contiguous()
                                for x in (query, key, value, gradient, out))
    # [batch, heads, seq, 8], eight equal values
    largest = lse.permute(1, 2, 0).unsqueeze(-1).repeat(1, 1, 1, 8)
    found = torch.ops.npu.npu_fusion_attention_grad(
        q, k, v, upstream, q.size(2), "BSND", softmax_max=largest, softmax_sum=torch.ones_like(largest),
        attention_in=whole, scale_value=scale, keep_prob=1.0, **_seen(query, causal))
    of_query, of_key, of_value = (x.transpose(0, 1) for x in found[:3])
    return of_query, of_key, of_value


def _seen(query: Tensor, causal: bool) -> dict[str, object]:
    if not causal:
        return {"sparse_mode": 0}
    return {"atten_mask": compressed_causal_mask(query.device), "sparse_mode": 2}


Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
FORMS: dict[str, tuple[Forward, Backward]] = {"cpu": (cpu, cpu_gradients), "npu": (npu, npu_gradients)}
