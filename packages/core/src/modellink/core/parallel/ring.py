# SPDX-License-Identifier: Apache-2.0
"""Ring attention (Liu et al. 2023, arXiv:2310.01889): each rank keeps its queries while keys and values travel round the ring.

Partial results are combined by their log-sum-exp, so that a rank never holds more than two sets of keys. Chunks
masked by causality or a window are skipped; with the token order of context.py every rank does the same amount of
work. The backward pass sends keys and values round once more, followed by their gradients.

Not here: attention dropout. Pairs of chunks with full or causal attention use a fused kernel; windows, caps and biases use plain
PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.kernels import ops
from modellink.kernels.ops.attention import Variant, scores_of
from modellink.kernels.ops.attention_block import supports

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Ring:
    """A ring of ranks that pass keys and values on.

    Attributes:
        group: the ranks of the ring.
        held: chunk numbers that each rank holds, in the order of its tokens; all chunks have the same length.
        second: another group of the same ranks. With it, transfers overlap with computation, and a rank sends in one group while
            it receives in the other; without it, transfers follow the computation in one group.
    """

    group: Any
    held: list[list[int]]
    second: Any = None

    def passed_on(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Send to the next rank and receive from the previous one: (buffers, handles to wait for)."""
        rank, size = self.group.rank(), self.group.size()
        ahead, behind = (rank + 1) % size, (rank - 1) % size
        buffers = [torch.empty_like(tensor) for tensor in tensors]

        def send() -> list[Any]:
            return [self._transfer(dist.isend, tensor, ahead, sender=rank) for tensor in tensors]

        def receive() -> list[Any]:
            return [self._transfer(dist.irecv, buffer, behind, sender=behind) for buffer in buffers]
        # the first transfer waits for its partner, so every other rank receives first
        works = send() + receive() if rank % 2 == 0 else receive() + send()
        return buffers, works

    def _transfer(self, call: Any, tensor: Tensor, other: int, *, sender: int) -> Any:
        """Start one transfer; even ranks send in the first group, odd ranks in the second."""
        group = self.group if self.second is None or sender % 2 == 0 else self.second
        return call(tensor, dist.get_global_rank(self.group, other), group=group)

    def pairs(self, source: int, seq: int, window: int | None) -> Iterator[tuple[slice, slice, int, int]]:
        """The pairs of chunks with attention between them, for the keys of ring rank `source`.

        Yields:
            (query rows, key rows, first query position, first key position)
        """
        mine, theirs = self.held[self.group.rank()], self.held[source]
        size = seq // len(mine)
        for i, query in enumerate(mine):
            for j, key in enumerate(theirs):
                nearest = (query - key) * size - (size - 1)  # distance of the first query from the last key
                if key <= query and (window is None or nearest < window):
                    yield slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size), query * size, key * size


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, variant: Variant, ring: Ring) -> Tensor:
        seq, rank, size = query.size(0), ring.group.rank(), ring.group.size()
        out = query.new_zeros(*query.shape[:3], value.size(-1), dtype=torch.float32)
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
        block = [key.contiguous(), value.contiguous()]
        for step in range(size):
            last = step + 1 == size
            passing = ring.passed_on(block) if ring.second is not None and not last else None
            for rows, columns, first, start in ring.pairs((rank - step) % size, seq, variant.window):
                new = attended(query[rows], block[0][columns], block[1][columns], variant, first, start)
                out[rows], lse[rows] = ops.ring_update(out[rows], lse[rows], *new)
            if not last:
                block = _arrived(passing or ring.passed_on(block))
        ctx.variant, ctx.ring = variant, ring
        ctx.save_for_backward(query, key, value, out, lse)
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        variant, ring = ctx.variant, ctx.ring
        seq, rank, size = query.size(0), ring.group.rank(), ring.group.size()
        of_query = torch.zeros_like(query, dtype=torch.float32)
        block = [key.contiguous(), value.contiguous()]
        coming: tuple[list[Tensor], list[Any]] = ([], [])  # gradients of the present block from the previous ranks
        for step in range(size):
            last = step + 1 == size
            passing = ring.passed_on(block) if ring.second is not None and not last else None
            of_block = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in block]
            for rows, columns, first, start in ring.pairs((rank - step) % size, seq, variant.window):
                found = attended_gradients((gradients[0][rows], out[rows], lse[rows]), query[rows], block[0][columns],
                                           block[1][columns], variant, first, start)
                for whole, part, where in zip((of_query, *of_block), found, (rows, columns, columns), strict=True):
                    whole[where] += part
            if not last:
                block = _arrived(passing or ring.passed_on(block))
            for mine, before in zip(of_block, _arrived(coming), strict=False):
                mine += before
            coming = ring.passed_on(of_block)  # after the last step they are back on their own rank
            if ring.second is None:
                coming = _arrived(coming), []
        made = (of_query, *_arrived(coming))
        return (*(grad.to(x.dtype) for grad, x in zip(made, (query, key, value), strict=True)), None, None)


def attended(query: Tensor, key: Tensor, value: Tensor, variant: Variant, first: int, start: int) -> tuple[Tensor, Tensor]:
    """Attention of queries from position `first` over keys from `start`: the result and its log-sum-exp, in fp32."""
    if supports(query, value, variant):
        return ops.attention_block(query, key, value, variant.scale, causal=first == start)
    scores = scores_of(query, key, variant, first, start)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=LOWEST).unsqueeze(-1)).exp()  # for a query that sees no key both are -inf
    return _weighted(weights, value), lse.permute(2, 0, 1)


def attended_gradients(whole: tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, variant: Variant,
                       first: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """The contribution of a pair of chunks to the gradients of query, key and value.

    Args:
        whole: gradient, result and log-sum-exp of the attention of these queries over all keys.
    """
    gradient, out, lse = whole
    if supports(query, value, variant):
        return ops.attention_block_gradients(gradient, query, key, value, out, lse, variant.scale, causal=first == start)
    with torch.enable_grad():  # autograd differentiates caps and biases
        q, k = (x.detach().requires_grad_() for x in (query, key))
        scores = scores_of(q, k, variant, first, start)
    weights = (scores.detach() - lse.clamp(min=LOWEST).permute(1, 2, 0).unsqueeze(-1)).exp()
    upstream = gradient.float().permute(1, 2, 0, 3)
    of_out = (upstream * out.permute(1, 2, 0, 3)).sum(-1, keepdim=True)
    values = _per_head(value, weights.size(1)).float()
    of_query, of_key = torch.autograd.grad(scores, (q, k), weights * (upstream @ values.transpose(-1, -2) - of_out))
    return of_query, of_key, _per_group(weights.transpose(-1, -2) @ upstream, value.size(2))


def _arrived(passing: tuple[list[Tensor], list[Any]]) -> list[Tensor]:
    buffers, pending = passing
    for work in pending:
        work.wait()
    return buffers


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[seq, batch, groups, dim] -> [batch, heads, seq, dim]."""
    return x.permute(1, 2, 0, 3).repeat_interleave(heads // x.size(2), dim=1)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """The sum over the heads of each group: [batch, heads, seq, dim] -> [seq, batch, groups, dim]."""
    return x.unflatten(1, (groups, -1)).sum(2).permute(2, 0, 1, 3)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """[batch, heads, seq, keys] and values -> [seq, batch, heads, dim]."""
    return (weights @ _per_head(value, weights.size(1)).float()).permute(2, 0, 1, 3)


def ring_attention(query: Tensor, key: Tensor, value: Tensor, variant: Variant, ring: Ring) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks; shapes as in `ops.attention`."""
    out: Tensor = _Attention.apply(query, key, value, variant, ring)
    return out
