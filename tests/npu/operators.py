# SPDX-License-Identifier: Apache-2.0
"""What npu operators mean, as this project reads torch_npu's documentation of them: plain PyTorch on CPU tensors.

Signatures are those of torch_npu 2.13.0. Not here: what a kernel of CANN rounds, and where it refuses what this computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def differentiated(function: Callable[..., Any], gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*given), given, gradient)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (x.float() * scale * gamma.float()).to(x.dtype), scale


def rms_norm_backward(gradient: Tensor, x: Tensor, gamma: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    even = x.float() * scale
    weighted = gradient.float() * gamma.float()
    of_x = scale * (weighted - even * (weighted * even).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (gradient.float() * even).flatten(0, -2).sum(0)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def swiglu_backward(gradient: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    return differentiated(lambda x: swiglu(x, dim), gradient, x)[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str = "half", rotate: None = None) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def rotary_backward(gradient: Tensor, x: Tensor, cos: Tensor, sin: Tensor, mode: str = "half") -> tuple[Tensor, ...]:
    return differentiated(lambda *inputs: rotary(*inputs, mode), gradient, x, cos, sin)


def seen(queries: int, keys: int, mode: int, before: int, after: int, mask: Tensor | None) -> Tensor:
    """Which keys each query sees; a mask is True where one is not seen. A compressed mask has one size and one content."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if mode in (2, 3, 4):
        assert mask is not None and mask.dtype == torch.bool
        assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1)), "not the compressed causal mask"
    if mode in (0, 1):
        return torch.ones(queries, keys, dtype=torch.bool) if mask is None else ~mask
    if mode == 2:
        return j <= i
    distance = i + (keys - queries) - j
    return distance >= 0 if mode == 3 else (distance >= -after) & (distance <= before)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: float, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, seq, dim]; the result, and the maximum and sum of the softmax, eight times."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    exponentials = (scores - largest.clamp(min=torch.finfo(torch.float32).min)).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = torch.nn.functional.dropout(exponentials / total.clamp(min=1e-30), 1 - keep)
    return (weights @ v.float()).to(q.dtype), *(x.expand(-1, -1, -1, 8).contiguous() for x in (largest, total))


def fusion_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: None = None,
                     padding_mask: None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
                     pre_tockens: int = 2**31 - 1, next_tockens: int = 2**31 - 1, inner_precise: int = 0, prefix: None = None,
                     actual_seq_qlen: list[int] | None = None, actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0,
                     **_: Any) -> tuple[Any, ...]:
    assert query.size(-2) == head_num and query.dtype == key.dtype == value.dtype and key.shape == value.shape
    assert query.size(-1) == key.size(-1) <= 768
    options = sparse_mode, pre_tockens, next_tockens, atten_mask
    if input_layout == "BSND":
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, largest, total = _attend(q, k, v, scale, keep_prob, seen(q.size(2), k.size(2), *options))
        return out.transpose(1, 2).contiguous(), largest, total, torch.empty(0, dtype=query.dtype), 0, 0, 0
    assert input_layout == "TND" and actual_seq_qlen and actual_seq_kvlen and len(actual_seq_qlen) <= 1024
    assert actual_seq_qlen[-1] == query.size(0) and actual_seq_kvlen[-1] == key.size(0)
    parts, first, first_key = [], 0, 0
    for last, last_key in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[first:last], key[first_key:last_key], value[first_key:last_key]))
        part = _attend(q, k, v, scale, keep_prob, seen(q.size(2), k.size(2), *options))
        parts.append([x[0].transpose(0, 1) for x in part])
        first, first_key = last, last_key
    out, largest, total = (torch.cat(each).contiguous() for each in zip(*parts, strict=True))
    return out, largest, total, torch.empty(0, dtype=query.dtype), 0, 0, 0


def fusion_attention_grad(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, head_num: int, input_layout: str, *,
                          scale_value: float = 1.0, keep_prob: float = 1.0, **options: Any) -> tuple[Any, ...]:
    assert keep_prob == 1, "what was dropped is not known here"
    if input_layout == "BSND":
        return *_of_block(query, key, value, gradient, scale_value, options), torch.empty(0), torch.empty(0)
    given = {name: options[name] for name in ("atten_mask", "pre_tockens", "next_tockens", "actual_seq_qlen", "actual_seq_kvlen",
                                              "sparse_mode") if name in options}
    found = differentiated(lambda *inputs: fusion_attention(*inputs, head_num, input_layout, scale=scale_value, **given)[0],
                           gradient, query, key, value)
    return *found, torch.empty(0), torch.empty(0)


def _of_block(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float, options: dict[str, Any]) -> Any:
    """From the maximum and the sum of a softmax and its result, which may be over more keys than these."""
    q, k, v, upstream, out = (x.transpose(1, 2).float() for x in (query, key, value, gradient, options["attention_in"]))
    groups = k.size(1)
    k, v = (x.repeat_interleave(q.size(1) // groups, 1) for x in (k, v))
    allowed = seen(q.size(2), k.size(2), options.get("sparse_mode", 0), options.get("pre_tockens", 2**31 - 1),
                   options.get("next_tockens", 2**31 - 1), options.get("atten_mask"))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    largest, total = (options[name][..., :1] for name in ("softmax_max", "softmax_sum"))
    weights = (scores - largest.clamp(min=torch.finfo(torch.float32).min)).exp() / total.clamp(min=1e-30)
    of_scores = weights * (upstream @ v.transpose(-1, -2) - (upstream * out).sum(-1, keepdim=True)) * scale

    def by_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).sum(2)
    found = of_scores @ k, by_group(of_scores.transpose(-1, -2) @ q), by_group(weights.transpose(-1, -2) @ upstream)
    return tuple(x.transpose(1, 2).to(query.dtype).contiguous() for x in found)


def grouped_matmul(x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, split_item: int = 0,
                   group_type: int | None = None, group_list_type: int = 0) -> list[Tensor]:
    (rows,), (matrix,) = x, weight
    assert split_item == 3 and group_list_type == 0 and group_list.dtype == torch.int64
    ends = group_list.tolist()
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if group_type == 0:  # groups of rows, a matrix [in, out] each
        assert sum(lengths) == rows.size(0) and rows.size(1) == matrix.size(1)
        return [torch.cat([part @ one for part, one in zip(rows.split(lengths), matrix, strict=True)])]
    assert group_type == 2 and sum(lengths) == rows.size(1) == matrix.size(0)  # groups of what is summed over
    return [torch.stack([a @ b for a, b in zip(rows.split(lengths, 1), matrix.split(lengths), strict=True)])]


def ring_attention_update(out: Tensor, largest: Tensor, total: Tensor, new_out: Tensor, new_largest: Tensor, new_total: Tensor, *,
                          actual_seq_qlen: None = None, input_layout: str = "SBH", input_softmax_layout: str = "",
                          ) -> tuple[Tensor, Tensor, Tensor]:
    assert input_layout == "SBH" and largest.size(-1) == 8 and bool((largest == largest[..., :1]).all())
    joined = torch.maximum(largest, new_largest)
    old, new = total * (largest - joined).exp(), new_total * (new_largest - joined).exp()
    sums, dim = old + new, out.size(-1) // largest.size(1)

    def share(x: Tensor) -> Tensor:  # [batch, heads, seq, 8] -> [seq, batch, heads x dim]
        return (x / sums)[..., 0].permute(2, 0, 1).repeat_interleave(dim, -1)
    return out * share(old) + new_out * share(new), joined, sums


def apply_adam_w(beta1_power: float, beta2_power: float, lr: float, decay: float, beta1: float, beta2: float, epsilon: float,
                 grad: Tensor, max_grad_norm: None, amsgrad: bool, maximize: bool, *, out: list[Tensor]) -> tuple[Tensor, ...]:
    assert max_grad_norm is None and not amsgrad and not maximize
    param, mean, variance = out
    param.mul_(1 - lr * decay)
    mean.lerp_(grad, 1 - beta1)
    variance.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (variance / (1 - beta2_power * beta2)).sqrt_().add_(epsilon)
    param.addcdiv_(mean, denominator, value=-lr / (1 - beta1_power * beta1))
    return param, mean, variance


def _communicator(name: str) -> Any:
    from device import COMMUNICATORS
    return COMMUNICATORS[name]


def _mc2(x: Tensor, matrix: Tensor, inner: range) -> None:
    assert x.is_contiguous() and x.dtype == matrix.dtype and x.dtype in (torch.float16, torch.bfloat16) and x.size(1) in inner


def all_gather_mm(x: Tensor, matrix: Tensor, hcom: str, world_size: int, *, bias: None = None, gather_index: int = 0,
                  gather_output: bool = True) -> tuple[Tensor, Tensor]:
    _mc2(x, matrix, range(256, 65535))
    assert bias is None and gather_index == 0 and gather_output and world_size == _communicator(hcom).size()
    whole = x.new_empty(world_size * x.size(0), x.size(1))
    _communicator(hcom)._allgather_base(whole, x).wait()
    return whole @ matrix, whole


def mm_reduce_scatter(x: Tensor, matrix: Tensor, hcom: str, world_size: int, *, reduce_op: str = "sum",
                      bias: None = None) -> Tensor:
    _mc2(x, matrix, range(256, 65535))
    assert bias is None and reduce_op == "sum" and world_size == _communicator(hcom).size()
    product = x @ matrix
    out = product.new_empty(product.size(0) // world_size, product.size(1))
    _communicator(hcom)._reduce_scatter_base(out, product, dist.ReduceScatterOptions()).wait()
    return out


def mm_all_reduce(x: Tensor, matrix: Tensor, hcom: str, *, reduce_op: str = "sum", bias: None = None) -> Tensor:
    _mc2(x, matrix, range(1, 2**31))
    assert bias is None and reduce_op == "sum"
    out = x @ matrix
    _communicator(hcom).allreduce([out]).wait()
    return out


MEANINGS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm, "npu_rms_norm_backward": rms_norm_backward, "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward, "npu_rotary_mul": rotary, "npu_rotary_mul_backward": rotary_backward,
    "npu_fusion_attention": fusion_attention, "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_grouped_matmul": grouped_matmul, "npu_ring_attention_update": ring_attention_update,
    "npu_apply_adam_w.out": apply_adam_w, "npu_all_gather_base_mm": all_gather_mm,
    "npu_mm_reduce_scatter_base": mm_reduce_scatter, "npu_mm_all_reduce_base": mm_all_reduce}
