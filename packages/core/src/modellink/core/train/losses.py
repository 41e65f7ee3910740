# SPDX-License-Identifier: Apache-2.0
"""Token losses over vocabulary-parallel logits."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.core.data.batch import Batch
from modellink.core.parallel.context import local_part
from modellink.kernels import ops


def token_losses(batch: Batch, logits: Tensor) -> Tensor:
    """Cross-entropy in nats of every label that this rank holds, [batch, seq / cp], fp32; destroys the logits.

    Args:
        logits: [batch, seq / cp, vocabulary / tp].
    """
    group = parallel_state.get_tensor_model_parallel_group()
    return ops.cross_entropy(logits, local_part(batch.labels), group, overwrite=True)


def masked_mean(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of `values` [batch, seq / cp] where the loss mask is set, divided by `batch.divisor` or the size of the mask.

    Returns:
        The share of this rank, to differentiate, and the detached sum over context-parallel ranks, to report.
    """
    divisor = batch.loss_mask.sum().clamp(min=1) if batch.divisor is None else batch.divisor
    share = (values * local_part(batch.loss_mask)).sum() / divisor
    total = share.detach().clone()  # megatron-core's schedule scales the share in place
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return share, total
