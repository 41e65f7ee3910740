# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a vocabulary that may be sharded across tensor-parallel ranks (Megatron-LM, Shoeybi et
al. 2019).

The logits of a batch are often the largest tensor of a run. They are processed a few rows at a time, in fp32
only for that long, and are what the backward pass keeps; several ranks exchange three reductions of [tokens].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WIDE = {"cpu": 2**21}
"""Number of logits converted to fp32 at a time, by device type: on a CPU they fit its caches."""
WIDE_ELSEWHERE = 2**26


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None, *,
                  overwrite: bool = False) -> Tensor:
    """Return the negative log-probability of each label, in fp32.

    Args:
        logits: [..., vocabulary / ranks of `group`], this rank's part, contiguous in the vocabulary.
        labels: [...] token ids in the full vocabulary.
        group: the ranks across which the vocabulary is sharded; None or one rank: it is not sharded.
        overwrite: the logits are not used again; the backward pass may overwrite them with their gradient.

    Returns:
        [...] losses in nats.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"cross_entropy: labels of {list(labels.shape)} for logits of {list(logits.shape)}")
    if logits.dim() == 3 and not logits.is_contiguous() and logits.transpose(0, 1).is_contiguous():
        return cross_entropy(logits.transpose(0, 1), labels.transpose(0, 1), group,
                             overwrite=overwrite).transpose(0, 1)
    cut = group if group is not None and group.size() > 1 else None
    losses: Tensor = _ByRows.apply(logits.flatten(0, -2), labels.flatten(), cut, overwrite)
    return losses.view_as(labels)


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None,
                overwrite: bool) -> Tensor:
        size = logits.size(-1)
        start = group.rank() * size if group else 0
        elsewhere = (labels < start) | (labels >= start + size)
        local = (labels - start).masked_fill(elsewhere, 0).unsqueeze(-1)
        largest = logits.amax(-1, keepdim=True).float()
        if group:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        target = (logits.gather(-1, local).float() - largest).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        total = torch.cat([(logits[rows] - largest[rows]).exp_().sum(-1, keepdim=True)
                           for rows in _rows(logits)])
        if group:
            both = torch.stack([target, total])
            dist.all_reduce(both, group=group)
            target, total = both
        ctx.save_for_backward(logits, largest + total.log(), local, elsewhere)
        ctx.overwrite = overwrite
        return (total.log() - target).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normalizer, local, elsewhere = ctx.saved_tensors
        result = logits if ctx.overwrite else torch.empty_like(logits)
        gradient = gradient.unsqueeze(-1)
        of_label = -gradient.masked_fill(elsewhere.unsqueeze(-1), 0.0)  # zero if another rank has the label
        for rows in _rows(logits):
            wide = (logits[rows] - normalizer[rows]).exp_().mul_(gradient[rows])
            result[rows] = wide.scatter_add_(-1, local[rows], of_label[rows])
        return result, None, None, None


def _rows(logits: Tensor) -> Iterator[slice]:
    count = max(1, WIDE.get(logits.device.type, WIDE_ELSEWHERE) // logits.size(-1))
    return (slice(first, first + count) for first in range(0, logits.size(0), count))
