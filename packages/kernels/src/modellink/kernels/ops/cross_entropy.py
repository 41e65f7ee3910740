"""Cross entropy over a vocabulary that may be cut over tensor-parallel ranks (Megatron-LM, Shoeybi et al. 2019).

The plain form is differentiable PyTorch for one rank; the parallel form keeps one [tokens, vocabulary / ranks] tensor for
the backward pass and needs three reductions of [tokens].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Negative log-probability of each label, in fp32.

    Args:
        logits: [..., vocabulary / ranks of `group`], this rank's part, contiguous in the vocabulary.
        labels: [...] token ids in the whole vocabulary.
        group: the ranks the vocabulary is cut over; None or one rank: it is whole.

    Returns:
        [...] losses in nats.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"cross_entropy: labels of {list(labels.shape)} for logits of {list(logits.shape)}")
    if group is None or group.size() == 1:
        return plain(logits, labels)
    loss: Tensor = _Parallel.apply(logits, labels, group)
    return loss


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = logits.size(-1)
        start = group.rank() * size
        wide = logits.float()
        largest = wide.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        wide = wide - largest.unsqueeze(-1)
        elsewhere = (labels < start) | (labels >= start + size)
        local = (labels - start).masked_fill(elsewhere, 0)
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        probabilities = wide.exp_()
        total = probabilities.sum(-1)
        both = torch.stack([target, total])
        dist.all_reduce(both, group=group)
        target, total = both
        ctx.save_for_backward(probabilities.div_(total.unsqueeze(-1)), local, elsewhere)
        ctx.dtype = logits.dtype
        result: Tensor = total.log() - target
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, local, elsewhere = ctx.saved_tensors
        minus_one = elsewhere.float().sub_(1).unsqueeze(-1)  # -1 where the label is ours, 0 where it is not
        result = probabilities.scatter_add(-1, local.unsqueeze(-1), minus_one)
        return result.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None, None
