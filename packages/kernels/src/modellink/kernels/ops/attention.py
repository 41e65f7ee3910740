# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention with grouped queries, causal or over a cache.

It has two uses: full sequences (causal), and queries at given positions against keys 0 .. n - 1 (a cache).
Variants: a sliding window, ALiBi, a soft cap on the scores, several documents packed into a sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from modellink.kernels.ops.dispatch import form_of

_PACKED = 1 << 24  # largest mask over a cache on a CPU that is copied for each head of a group, 64 MB in fp32
# Limits from torch_npu's documentation of npu_fusion_attention.
_NPU_MASK = 2048  # size of its compressed masks
_NPU_DIM, _NPU_HEADS = 768, 256  # largest head size and number of heads
_NPU_DOCUMENTS = 1024  # most documents in one call


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents packed one after the other into the rows of a batch; a token sees only its own document.

    Attributes:
        starts: [batch, seq] position in the row at which the document of each token starts.
    """

    starts: Tensor

    @functools.cached_property
    def ends(self) -> list[int]:
        """The end of each document, counted over the concatenated rows; a row ends a document."""
        positions = torch.arange(self.starts.size(1), device=self.starts.device)
        begins: list[int] = (self.starts == positions).flatten().nonzero().flatten().tolist()
        return [*begins[1:], self.starts.numel()]


@dataclass(frozen=True)
class Variant:
    """Variants of softmax(query key^T * scale) value.

    Attributes:
        scale: factor of the scores.
        dropout: probability with which a weight is dropped.
        window: a query at position i sees keys i - window + 1 to i; None: all up to i.
        softcap: scores become softcap x tanh(scores / softcap).
        slopes: [heads]; slope x (j - i) is added to the score of key j (ALiBi, Press et al. 2022).
            Implementations that add slope x j differ by a constant per query, which softmax cancels.
        documents: of full sequences; None: a sequence is one document.
    """

    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    documents: Documents | None = None


def attention(query: Tensor, key: Tensor, value: Tensor, variant: Variant,
              positions: Tensor | None = None) -> Tensor:
    """Return softmax(query key^T * scale) value, in the given variant.

    Args:
        query: [seq, batch, heads, dim].
        key: [key seq, batch, groups, dim]; a group of keys serves heads / groups query heads.
        value: [key seq, batch, groups, value dim].
        positions: [batch, seq] of the queries; a query at position >= j sees key j. None: causal over one
            sequence, which requires key seq == seq.

    Returns:
        [seq, batch, heads, value dim].

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    _check(query, key, value, variant, positions)
    return form_of("attention", query.device.type, FORMS, plain)(query, key, value, variant, positions)


def _check(query: Tensor, key: Tensor, value: Tensor, variant: Variant, positions: Tensor | None) -> None:
    four = query.dim() == key.dim() == value.dim() == 4
    if not four or key.shape[:3] != value.shape[:3] or query.size(1) != key.size(1) or query.size(3) != key.size(3) or (
            query.size(2) % key.size(2)):
        raise ValueError(f"attention: queries of {list(query.shape)} for keys of {list(key.shape)} and "
                         f"values of "
                         f"{list(value.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"attention: {query.dtype} queries, {key.dtype} keys and {value.dtype} values")
    seq, batch, heads = query.shape[:3]
    if positions is None and key.size(0) != seq:
        raise ValueError(f"attention: {key.size(0)} keys for {seq} queries, and no positions")
    if positions is not None and (positions.shape != (batch, seq) or variant.documents is not None):
        raise ValueError(f"attention: positions of {list(positions.shape)} for {batch} x {seq} queries"
                         + " of documents" * (variant.documents is not None))
    if variant.documents is not None and variant.documents.starts.shape != (batch, seq):
        raise ValueError(f"attention: documents of {list(variant.documents.starts.shape)} for {batch} x "
                         f"{seq} queries")
    if variant.slopes is not None and variant.slopes.shape != (heads,):
        raise ValueError(f"attention: slopes of {list(variant.slopes.shape)} for {heads} heads")
    if not 0 <= variant.dropout < 1 or (variant.window is not None
                                        and variant.window < 1) or variant.softcap == 0:
        raise ValueError(f"attention: a dropout of {variant.dropout}, a window of {variant.window}, a cap of "
                         f"{variant.softcap}")


def alibi_slopes(heads: int) -> Tensor:
    """Return the slopes of ALiBi [heads]: powers of 2^(-8 / n) for the largest power of two n <= heads, then
    every second one of 2n."""
    closest = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / closest * (head + 1)) for head in range(closest)]
    slopes += [2 ** (-4 / closest * (2 * head + 1)) for head in range(heads - closest)]
    return torch.tensor(slopes)


def _distance(query: Tensor, keys: int, positions: Tensor | None) -> Tensor:
    """Return [batch or 1, 1, seq, keys]: position of the query minus position of the key."""
    if positions is None:
        positions = torch.arange(query.size(0), device=query.device)[None]
    return positions[:, None, :, None] - torch.arange(keys, device=query.device)


def _hidden(distance: Tensor, window: int | None) -> Tensor:
    """Return True for pairs in which the query must not see the key."""
    return (distance < 0) if window is None else (distance < 0) | (distance >= window)


def scores_of(query: Tensor, key: Tensor, variant: Variant, first: int = 0, first_key: int = 0,
              positions: Tensor | None = None) -> Tensor:
    """Return the input of softmax: [batch, heads, seq, key seq] in fp32, -inf if a query must not see a key.

    Positions of queries are `positions` [batch, seq], or start at `first`; those of keys start at
    `first_key`.
    """
    heads, groups = query.size(2), key.size(2)
    q, k = (t.permute(1, 2, 0, 3) for t in (query, key))
    scores = (q @ k.repeat_interleave(heads // groups, dim=1).transpose(-1, -2)).float() * variant.scale
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    distance = _distance(query, key.size(0), positions) + (first - first_key)
    if variant.slopes is not None:
        scores = scores - variant.slopes[:, None, None] * distance
    hidden = _hidden(distance, variant.window)
    if variant.documents is not None:
        starts = variant.documents.starts[:, None, first:first + query.size(0), None]
        hidden = hidden | (first_key + torch.arange(key.size(0), device=key.device) < starts)
    return scores.masked_fill(hidden, float("-inf"))


def plain(query: Tensor, key: Tensor, value: Tensor, variant: Variant, positions: Tensor | None) -> Tensor:
    weights = scores_of(query, key, variant, positions=positions).softmax(-1)
    weights = torch.nn.functional.dropout(weights, variant.dropout)
    v = value.permute(1, 2, 0, 3).repeat_interleave(query.size(2) // value.size(2), dim=1)
    return (weights.to(v.dtype) @ v).permute(2, 0, 1, 3)


def torch_fused(query: Tensor, key: Tensor, value: Tensor, variant: Variant,
                positions: Tensor | None) -> Tensor:
    if variant.softcap is not None:  # scaled_dot_product_attention does not support it
        return plain(query, key, value, variant, positions)
    if variant.documents is not None:
        return _by_document(query, key, value, variant, variant.documents.ends)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    each, numbers = q.size(1) // k.size(1), q.size(0) * q.size(2) * k.size(2)
    if positions is not None and query.device.type == "cpu" and each * numbers <= _PACKED:
        return _over_a_cache(q, k, v, variant, positions)
    mask = None
    if positions is not None or variant.slopes is not None or (variant.window is not None
                                                               and variant.window < key.size(0)):
        mask = _bias(query, key.size(0), variant, positions)
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=variant.scale, dropout_p=variant.dropout,
        enable_gqa=q.size(1) != k.size(1))
    return out.permute(2, 0, 1, 3)


def _bias(query: Tensor, keys: int, variant: Variant, positions: Tensor | None) -> Tensor:
    """Return the bias of the scores [batch or 1, heads or 1, seq, keys], -inf for hidden keys."""
    distance = _distance(query, keys, positions)
    hidden = _hidden(distance, variant.window)
    if variant.slopes is not None:
        bias = -variant.slopes.to(query.dtype)[:, None, None] * distance
    else:
        bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(hidden, float("-inf"))


def _over_a_cache(q: Tensor, k: Tensor, v: Tensor, variant: Variant, positions: Tensor) -> Tensor:
    """Attend over a cache: [batch, heads, seq, dim] and so on -> [seq, batch, heads, value dim].

    The heads of a group are treated as additional queries of one head: torch would otherwise copy keys and
    values for each of them, and its blocks of queries are larger this way.
    """
    groups, seq = k.size(1), q.size(2)
    each = q.size(1) // groups
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q.unflatten(1, (groups, each)).flatten(2, 3), k, v,
        attn_mask=_packed_bias(q, k.size(2), each, variant, positions), scale=variant.scale,
        dropout_p=variant.dropout)
    joined: Tensor = out.unflatten(2, (each, seq)).permute(3, 0, 1, 2, 4).flatten(2, 3)
    return joined


_biases: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # positions -> the bias made from them


def _packed_bias(q: Tensor, keys: int, each: int, variant: Variant, positions: Tensor) -> Tensor:
    """Return `_bias` as [batch, groups or 1, `each` heads of a group x seq, keys].

    All layers of a pass have the same positions, so the bias is cached as long as they exist. (Only on a CPU:
    a captured graph computes it again, from other positions in the same memory.)
    """
    def make() -> Tensor:
        bias = _bias(q.permute(2, 0, 1, 3), keys, variant, positions)
        if variant.slopes is None:
            return bias.repeat(1, 1, each, 1)
        packed: Tensor = bias.unflatten(1, (-1, each)).flatten(2, 3)
        return packed
    if variant.slopes is not None:
        return make()
    made_for = (keys, each, variant.window, q.dtype)
    held = _biases.get(positions)
    if held is None or held[0] != made_for or not torch.equal(held[1], positions):
        held = _biases[positions] = made_for, positions.clone(), make()
    bias: Tensor = held[2]
    return bias


def _by_document(query: Tensor, key: Tensor, value: Tensor, variant: Variant, ends: list[int]) -> Tensor:
    """Attend within each document separately, so that hidden scores of other documents are never computed."""
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    alone, outs = replace(variant, documents=None), []
    rows = (x.transpose(0, 1).flatten(0, 1).split(lengths) for x in (query, key, value))
    for q, k, v in zip(*rows, strict=True):
        outs.append(torch_fused(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), alone, None).squeeze(1))
    return torch.cat(outs).view(query.size(1), query.size(0), query.size(2), -1).transpose(0, 1)


@functools.lru_cache
def compressed_causal_mask(device: torch.device) -> Tensor:
    """Return True above the diagonal: the pairs that must not be seen."""
    with torch.inference_mode(False):  # a later caller may be in training
        return torch.ones(_NPU_MASK, _NPU_MASK, dtype=torch.bool, device=device).triu(1)


def npu(query: Tensor, key: Tensor, value: Tensor, variant: Variant, positions: Tensor | None) -> Tensor:
    dim, value_dim = key.size(-1), value.size(-1)
    if variant.softcap is not None or variant.slopes is not None or value_dim > dim or dim > _NPU_DIM or (
            query.size(2) > _NPU_HEADS):
        return plain(query, key, value, variant, positions)
    if value_dim < dim:  # the op needs keys and values of one size
        value = torch.nn.functional.pad(value, (0, dim - value_dim))
    q, k, v = (t.transpose(0, 1).contiguous() for t in (query, key, value))
    if positions is not None:
        mask = _hidden(_distance(query, key.size(0), positions), variant.window)
        out = _npu(q, k, v, "BSND", variant, atten_mask=mask, sparse_mode=1)
    elif variant.documents is not None:
        out = _npu_packed([t.flatten(0, 1) for t in (q, k, v)], variant, variant.documents.ends).view_as(q)
    else:
        out = _npu(q, k, v, "BSND", variant, **_npu_causal(query, variant, key.size(0)))
    return out[..., :value_dim].transpose(0, 1)


def _npu_packed(qkv: list[Tensor], variant: Variant, ends: list[int]) -> Tensor:
    """Attend to queries, keys and values [tokens, heads, dim], with as many documents per call as it accepts."""
    outs, start = [], 0
    longest = max(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    for first in range(0, len(ends), _NPU_DOCUMENTS):
        part = ends[first:first + _NPU_DOCUMENTS]
        q, k, v = (x[start:part[-1]] for x in qkv)
        offsets = [end - start for end in part]
        outs.append(_npu(q, k, v, "TND", variant, actual_seq_qlen=offsets, actual_seq_kvlen=offsets,
                         **_npu_causal(q, variant, longest)))
        start = part[-1]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _npu_causal(query: Tensor, variant: Variant, keys: int) -> dict[str, object]:
    """Return the arguments for full sequences: all earlier keys (mode 2), or a band of them (mode 4)."""
    causal: dict[str, object] = {"atten_mask": compressed_causal_mask(query.device), "sparse_mode": 2}
    if variant.window is None or variant.window >= keys:
        return causal
    return causal | {"sparse_mode": 4, "pre_tockens": variant.window - 1, "next_tockens": 0}


def _npu(q: Tensor, k: Tensor, v: Tensor, layout: str, variant: Variant, **options: object) -> Tensor:
    out: Tensor = torch.ops.npu.npu_fusion_attention(q, k, v, q.size(-2), layout, scale=variant.scale,
                                                     keep_prob=1 - variant.dropout, **options)[0]
    return out


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Variant, Tensor | None], Tensor]] = {
    "cpu": torch_fused, "cuda": torch_fused, "npu": npu}
