# SPDX-License-Identifier: Apache-2.0
"""Which layers recompute only a part of their activations; megatron-core recomputes full layers by itself.

Layers of a pipeline stage are ordered as memory fills: layer l of chunk v has position l x chunks + v. The first ones are
recomputed in full, of the following ones only the activation function of the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from modellink.core.config.memory import MemoryConfig
from modellink.core.model.feed_forward import FeedForward


def feed_forwards(models: Sequence[nn.Module], memory: MemoryConfig) -> None:
    """Mark the layers of which only the feed-forward part is recomputed: the first ones, with --swap-attention."""
    for chunk, model in enumerate(models):
        layers: Any = model.get_submodule("decoder.layers")
        for number, layer in enumerate(layers):
            layer.recompute_mlp = number < memory.layers_of_chunk(memory.feed_forwards_recomputed, chunk, len(models))


def activations(models: Sequence[nn.Module], memory: MemoryConfig) -> None:
    """Mark the feed-forward parts whose activation function is recomputed."""
    if not memory.recompute_activation_function:
        return
    chunks, whole, count = len(models), memory.recompute_num_layers or 0, memory.recompute_activation_function_num_layers
    everywhere = whole if memory.enable_recompute_layers_per_pp_rank else whole * chunks
    for chunk, model in enumerate(models):
        layers: Any = model.get_submodule("decoder.layers")
        for number, layer in enumerate(layers):
            place, full = number * chunks + chunk, number < (memory.recomputed_in_full(chunk, chunks) or 0)
            if not full and not layer.recompute_mlp and (count is None or place < everywhere + count):
                for module in layer.modules():
                    if isinstance(module, FeedForward):
                        module.recompute_activation = True
