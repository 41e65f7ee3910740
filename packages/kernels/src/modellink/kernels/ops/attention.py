"""Scaled dot-product attention with grouped queries, causal or over a cache.

Two uses: a whole sequence (causal), and new tokens against cached keys, where `positions` says how far each query sees.
Not here yet: packed documents, soft caps and biases on the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_NPU_MASK = 2048  # npu_fusion_attention wants its compressed causal mask in this size


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, positions: Tensor | None = None,
              dropout: float = 0.0) -> Tensor:
    """softmax(query key^T * scale) value.

    Args:
        query: [seq, batch, heads, dim].
        key, value: [key seq, batch, groups, dim]; a group of keys serves heads / groups query heads.
        positions: [batch, seq] of the queries; key j is seen by a query at position >= j. None: causal over one sequence,
            which needs key seq == seq.
        dropout: probability with which a weight is dropped.

    Returns:
        [seq, batch, heads, dim].
    """
    return FORMS.get(query.device.type, torch_fused)(query, key, value, scale, positions, dropout)


def _hidden(positions: Tensor, keys: int) -> Tensor:
    """[batch, 1, seq, keys], True where a query must not see a key."""
    return torch.arange(keys, device=positions.device) > positions[:, None, :, None]


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, positions: Tensor | None, dropout: float) -> Tensor:
    heads, groups = query.size(2), key.size(2)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    if positions is None:
        positions = torch.arange(query.size(0), device=query.device).expand(query.size(1), -1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    weights = scores.masked_fill(_hidden(positions, key.size(0)), float("-inf")).softmax(-1)
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights.to(v.dtype) @ v).permute(2, 0, 1, 3)


def torch_fused(query: Tensor, key: Tensor, value: Tensor, scale: float, positions: Tensor | None,
                dropout: float) -> Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    mask = None if positions is None else ~_hidden(positions, key.size(0))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=q.size(1) != k.size(1))
    return out.permute(2, 0, 1, 3)


@functools.lru_cache
def _compressed_causal_mask(device: torch.device) -> Tensor:
    return torch.ones(_NPU_MASK, _NPU_MASK, dtype=torch.bool, device=device).triu(1)


def npu(query: Tensor, key: Tensor, value: Tensor, scale: float, positions: Tensor | None, dropout: float) -> Tensor:
    q, k, v = (t.transpose(0, 1).contiguous() for t in (query, key, value))  # BSND
    if positions is None:
        mask, mode = _compressed_causal_mask(query.device), 2
    else:
        mask, mode = _hidden(positions, key.size(0)), 1
    out: Tensor = torch.ops.npu.npu_fusion_attention(
        q, k, v, q.size(2), "BSND", atten_mask=mask, scale=scale, keep_prob=1 - dropout, sparse_mode=mode)[0]
    return out.transpose(0, 1)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None, float], Tensor]] = {"npu": npu}
