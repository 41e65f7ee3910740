# SPDX-License-Identifier: Apache-2.0
"""Applies the memory settings of a run to its built models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from modellink.core.config import MemoryConfig
from modellink.core.memory.recompute import activations, feed_forwards
from modellink.core.memory.swap import swap
from modellink.core.model.load import bare


def save_memory(models: Sequence[nn.Module], memory: MemoryConfig) -> None:
    """Mark what is recomputed and hook what is offloaded, in the model chunks of this rank.

    Recomputing of full layers is megatron-core's own and already set in the models' configuration.
    """
    chunks = [bare(model) for model in models]
    feed_forwards(chunks, memory)
    activations(chunks, memory)  # reads which feed-forward parts are recomputed
    swap(chunks, memory)
