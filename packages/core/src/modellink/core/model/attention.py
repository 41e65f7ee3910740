# SPDX-License-Identifier: Apache-2.0
"""Self-attention over megatron-core's parallel linears: rotary positions, an optional cache, and one fused op.

megatron-core's own forward ignores position ids, so only its parameters and its split into heads are used.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from torch import Tensor, nn

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.rotary import Rotary
from modellink.core.model.state import SequenceState
from modellink.core.parallel.attention import ContextParallel
from modellink.kernels import ops
from modellink.kernels.ops.attention import Variant, alibi_slopes
from modellink.kernels.ops.rotary import yarn_scale


class SelfAttention(MegatronSelfAttention):
    """Hidden states [seq (/ tp with sequence parallelism), batch, hidden] -> the same shape."""

    def __init__(self, *args: Any, rotary: Rotary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = rotary

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: SequenceState | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        state = packed_seq_params or SequenceState()
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = self.rotary(state, query, key)
        if state.cache is not None:
            context = state.cache.attend(self.layer_number, query, key, value, self.core_attention.on(query.device)).flatten(2)
        else:
            context = self.core_attention(query, key, value, attention_mask, packed_seq_params=state)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context)
        return output


def softmax_scale(spec: ModelSpec, number: int) -> float:
    """The factor of the attention scores of layer `number` (from 0); DeepSeek-V2 compensates for yarn scaling here."""
    layer = spec.layer(number)
    scale = 1 / math.sqrt(spec.query_pre_attn_scalar or layer.head_dim)
    scaling = None if layer.rope is None else layer.rope.scaling
    if layer.attention == "latent" and scaling is not None and scaling.kind == "yarn":
        scale *= yarn_scale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


class CoreAttention(nn.Module):
    """query [seq, batch, heads / tp, dim], key and value [key seq, batch, groups / tp, dim] -> [seq, batch, heads x dim / tp].

    Args:
        layer_number: from 1, as megatron-core counts.
    """

    def __init__(self, config: Any, layer_number: int, spec: ModelSpec, **_: Any) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.attention_dropout
        layer, slopes = spec.layer(layer_number - 1), None
        if layer.alibi:
            tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
            slopes = alibi_slopes(layer.heads).chunk(tp)[rank]
        self.variant = Variant(softmax_scale(spec, layer.number), window=layer.window, softcap=spec.attn_logit_softcapping,
                               slopes=slopes)
        self.context_parallel = ContextParallel(config.sequence_cut) if config.context_parallel_size > 1 else None

    def on(self, device: torch.device) -> Variant:
        """The variant, with its tensor on the device."""
        if self.variant.slopes is not None and self.variant.slopes.device != device:
            self.variant = replace(self.variant, slopes=self.variant.slopes.to(device))
        return self.variant

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: SequenceState | None = None, **_: Any) -> Tensor:
        if self.config.recompute_granularity == "selective" and self.training:
            attended: Tensor = checkpoint(partial(self._attend, state=packed_seq_params), False, query, key, value)
            return attended
        return self._attend(query, key, value, packed_seq_params)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, state: SequenceState | None) -> Tensor:
        variant = self.on(query.device)
        if self.training and self.dropout:
            variant = replace(variant, dropout=self.dropout)
        if state is not None and state.documents is not None:
            variant = replace(variant, documents=state.documents)
        attend = self.context_parallel or ops.attention
        with self._dropout_generator(variant.dropout):
            return attend(query, key, value, variant).flatten(2)

    def _dropout_generator(self, dropout: float) -> AbstractContextManager[None]:
        """The random generator that differs between tensor-parallel ranks, which hold different heads.

        With sequence parallelism megatron-core already runs the complete layer under it.
        """
        if not dropout or self.config.sequence_parallel:
            return nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork
