# SPDX-License-Identifier: Apache-2.0
"""Token embeddings sharded by vocabulary, and learned position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.norm import Norm


class Embedding(MegatronModule):
    """Token ids [batch, seq] -> hidden states [seq (/ tp with sequence parallelism), batch, hidden].

    Args:
        vocab_size: padded to a multiple of the tensor parallel size.
    """

    def __init__(self, config: Any, spec: ModelSpec, vocab_size: int, tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.scale = spec.embedding_multiplier_scale
        learned = spec.position_embedding_type == "learned_absolute"
        # without positions to add first, the sum over vocabulary shards can leave each rank its part of the sequence
        self.reduce_scatter = config.sequence_parallel and not learned
        self.word_embeddings = VocabParallelEmbedding(
            num_embeddings=vocab_size, embedding_dim=spec.hidden_size, init_method=config.embedding_init_method,
            reduce_scatter_embeddings=self.reduce_scatter, config=config, tp_group=tp_group)
        if spec.embed_layernorm:
            self.word_embeddings.norm = Norm(config, spec.hidden_size, spec.norm_epsilon)
        self.position_embeddings: nn.Embedding | None = None
        if learned:
            self.position_embeddings = nn.Embedding(spec.max_position_embeddings, spec.hidden_size)
            if config.perform_initialization:
                config.embedding_init_method(self.position_embeddings.weight)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed tokens.

        Args:
            positions: [batch or 1, seq], for learned position embeddings. Default: 0 .. seq - 1.
        """
        hidden = self.word_embeddings(input_ids)
        if hasattr(self.word_embeddings, "norm"):
            hidden = self.word_embeddings.norm(hidden)
        if self.scale != 1.0:
            hidden = hidden * torch.tensor(self.scale, dtype=hidden.dtype)
        if self.position_embeddings is not None:
            if positions is None:
                positions = torch.arange(input_ids.size(1), device=input_ids.device)[None]
            hidden = hidden + self.position_embeddings(positions)
        if not self.reduce_scatter:
            hidden = hidden.transpose(0, 1).contiguous()
        if not self.config.sequence_parallel:
            return self.dropout(hidden)
        if not self.reduce_scatter:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.clone()  # the scattered part is a view that would keep the full tensor alive
        with get_cuda_rng_tracker().fork():
            return self.dropout(hidden)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: Any = None) -> dict[str, Any]:
        """megatron-core's, and the norm after the embedding, which VocabParallelEmbedding leaves out."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if hasattr(self.word_embeddings, "norm"):
            state |= sharded_state_dict_default(self.word_embeddings.norm, f"{prefix}word_embeddings.norm.",
                                                sharded_offsets, metadata, tp_group=self.tp_group)
        return state
