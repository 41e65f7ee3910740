# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys, values and optionally queries come from a compressed form.

Compressing matrices are replicated on all tensor-parallel ranks, expanding ones are sharded by heads. A part of every query and
key head is rotated; all heads share the rotated part of the key. A cache holds only the compressed form and the rotated part:
the expanding matrices are then applied to queries and to the attention output, the same product in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.linear import ColumnLinear, ReplicatedLinear
from modellink.core.model.norm import Norm
from modellink.core.model.rotary import Rotary
from modellink.core.model.state import SequenceState


class LatentAttention(MegatronModule):
    """Hidden states [seq (/ tp with sequence parallelism), batch, hidden] -> the same shape."""

    def __init__(self, config: Any, submodules: Any, layer_number: int, spec: ModelSpec, rotary: Rotary,
                 attn_mask_type: Any = None, **kwargs: Any) -> None:
        super().__init__(config)
        layer = spec.layer(layer_number - 1)
        self.layer_number, self.rotary, self.latent_dim = layer_number, rotary, layer.kv_lora_rank
        self.nope, self.rope, self.value_dim = layer.nope_dim, layer.head_dim - layer.nope_dim, layer.value_dim
        hidden, heads, latent = spec.hidden_size, layer.heads, layer.kv_lora_rank
        self.compressed_query = layer.q_lora_rank is not None
        if layer.q_lora_rank is None:
            self.linear_q_proj = self._column(hidden, heads * layer.head_dim)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config, hidden, layer.q_lora_rank)
            self.q_layernorm = Norm(config, layer.q_lora_rank, layer.latent_norm_epsilon)
            self.linear_q_up_proj = self._column(layer.q_lora_rank, heads * layer.head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(config, hidden, latent + self.rope)
        self.kv_layernorm = Norm(config, latent, layer.latent_norm_epsilon)
        self.linear_kv_up_proj = self._column(latent, heads * (self.nope + self.value_dim))
        self.core_attention = build_module(submodules.core_attention, config=config, layer_number=layer_number, **kwargs)
        self.linear_proj = build_module(
            submodules.linear_proj, heads * self.value_dim, hidden, config=config, init_method=config.output_layer_init_method,
            bias=False, input_is_parallel=True, skip_bias_add=True, is_expert=False)

    def _column(self, inputs: int, outputs: int) -> ColumnLinear:
        return ColumnLinear(inputs, outputs, config=self.config, init_method=self.config.init_method, bias=False,
                            gather_output=False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: SequenceState | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        state = packed_seq_params or SequenceState()
        query, (latent, rotated) = self._query(hidden_states), self._compressed(hidden_states)
        turned, rotated = self.rotary(state, query[..., self.nope:], rotated.unsqueeze(2))
        if state.cache is not None:
            context = self._cached(query[..., :self.nope], turned, latent, rotated, state)
        else:
            expanded, _ = self.linear_kv_up_proj(latent)
            key, value = expanded.unflatten(-1, (-1, self.nope + self.value_dim)).split([self.nope, self.value_dim], dim=-1)
            query = torch.cat([query[..., :self.nope], turned], dim=-1)
            key = torch.cat([key, rotated.expand(-1, -1, key.size(2), -1)], dim=-1)
            context = self.core_attention(query, key, value, attention_mask, packed_seq_params=state)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context)
        return output

    def _query(self, hidden_states: Tensor) -> Tensor:
        """Query heads [seq, batch, heads / tp, nope + rope], before rotation."""
        if self.compressed_query:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        else:
            query, _ = self.linear_q_proj(hidden_states)
        return query.unflatten(-1, (-1, self.nope + self.rope))

    def _compressed(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The latent [seq (/ tp), batch, latent], and the part of the key to rotate [seq, batch, rope]."""
        latent, rotated = self.linear_kv_down_proj(hidden_states).split([self.latent_dim, self.rope], dim=-1)
        # the heads of every rank use the rotated part, so its gradient is the sum over ranks
        rotated = gather_from_sequence_parallel_region(rotated) if self.config.sequence_parallel else (
            copy_to_tensor_model_parallel_region(rotated))
        return self.kv_layernorm(latent), rotated

    def _cached(self, plain: Tensor, turned: Tensor, latent: Tensor, rotated: Tensor, state: SequenceState) -> Tensor:
        """Attention over a cache of the compressed form, as one key that all heads share."""
        assert state.cache is not None
        expand = self.linear_kv_up_proj.weight.unflatten(0, (-1, self.nope + self.value_dim))
        query = torch.cat([torch.einsum("sbhd,hdl->sbhl", plain, expand[:, :self.nope]), turned], dim=-1)
        key = torch.cat([latent.unsqueeze(2), rotated], dim=-1)
        context = state.cache.attend(self.layer_number, query, key, None, self.core_attention.on(query.device))
        return torch.einsum("sbhl,hvl->sbhv", context, expand[:, self.nope:]).flatten(2)
