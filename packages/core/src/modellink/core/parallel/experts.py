# SPDX-License-Identifier: Apache-2.0
"""Token dispatch with overlapped transfers (`--moe-permutation-async-comm`).

megatron-core's dispatchers send routing map, scores and hidden states one after another; here all transfers, and those of their
gradients, run concurrently. Not here: which rank has which expert, and sorting, which are megatron-core's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from torch import Tensor

Transfer = Callable[[Tensor], tuple[Tensor, Any]]
"""Starts a transfer: (buffer of the result, handle to wait for)."""


def _gather(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    out = x.new_empty(group.size() * x.size(0), *x.shape[1:])
    return out, dist.all_gather_into_tensor(out, x, group=group, async_op=True)


def _scatter(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    out = x.new_empty(x.size(0) // group.size(), *x.shape[1:])
    return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)


def _exchange(x: Tensor, group: Any, received: Sequence[int] | None, sent: Sequence[int] | None) -> tuple[Tensor, Any]:
    out = x.new_empty(x.size(0) if received is None else sum(received), *x.shape[1:])
    return out, dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)


class _Together(torch.autograd.Function):
    """Applies transfer `there` to all tensors concurrently, and `back` to their gradients."""

    @staticmethod
    def forward(ctx: Any, there: Transfer, back: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = back
        return _all(there, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *_all(ctx.back, gradients)


def _all(transfer: Transfer, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    started = [transfer(tensor.contiguous()) for tensor in tensors]
    for _, work in started:
        work.wait()
    return tuple(out for out, _ in started)


class _AllGather(MoEAllGatherTokenDispatcher):
    routing_map: Tensor

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        group = self.tp_ep_group
        if group.size() == 1:
            return hidden_states, probs
        self.routing_map, work = _gather(self.routing_map.contiguous(), group)
        there, back = partial(_gather, group=group), partial(_scatter, group=group)
        hidden_states, probs = _Together.apply(there, back, hidden_states, probs)
        work.wait()
        return hidden_states, probs


class _AllToAll(MoEAlltoAllTokenDispatcher):
    tokens_per_expert: Tensor

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        group = self.ep_group
        if group.size() == 1:
            return hidden_states, probs
        received, sent = (None if splits is None else list(map(int, splits))
                          for splits in (self.output_splits, self.input_splits))
        there = partial(_exchange, group=group, received=received, sent=sent)
        back = partial(_exchange, group=group, received=sent, sent=received)
        hidden_states, probs = _Together.apply(there, back, hidden_states, probs)
        return hidden_states, probs


OVERLAPPED: dict[type, type] = {MoEAllGatherTokenDispatcher: _AllGather, MoEAlltoAllTokenDispatcher: _AllToAll}
"""megatron-core's dispatcher -> the same with overlapped transfers."""
