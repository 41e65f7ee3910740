"""Self-attention over megatron-core's parallel linears: positions, a cache where there is one, one fused op.

megatron-core's own forward ignores position ids, so its parameters and split into heads are kept and the way between is ours.
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
from modellink.core.model.rotary import RotaryTable
from modellink.core.model.state import SequenceState
from modellink.core.parallel.attention import ContextParallel
from modellink.kernels import ops
from modellink.kernels.ops.attention import Variant, alibi_slopes
from modellink.kernels.ops.rotary import yarn_scale


class Rotary:
    """Turns queries and keys by their positions; one object serves all layers of a stage."""

    def __init__(self, spec: ModelSpec) -> None:
        self._table = RotaryTable(spec) if spec.position_embedding_type == "rope" else None
        self._interleaved = spec.rotary_interleaved
        self.angles: tuple[Tensor, ...] = ()  # those used last, which are not one layer's own

    def __call__(self, state: SequenceState, *heads: Tensor) -> list[Tensor]:
        """Heads [seq, batch, heads, dim], rotated; the angles of a pass are looked up once."""
        if self._table is None:
            return list(heads)
        if state.angles is None:
            length = state.length
            if length is None:
                length = heads[0].size(0) if state.positions is None else int(state.positions.max()) + 1
            state.angles = self._table(length, state.positions, heads[0].device, heads[0].dtype, state.lengths)
        cos, sin = self.angles = state.angles
        return [ops.rotary(x, cos, sin, interleaved=self._interleaved) for x in heads]


class SelfAttention(MegatronSelfAttention):
    """hidden [seq (/ tp with sequence parallel), batch, hidden] -> the same."""

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


def softmax_scale(spec: ModelSpec) -> float:
    """What scores are multiplied by; DeepSeek-V2 makes up for yarn's stretching there."""
    scale = 1 / math.sqrt(spec.query_pre_attn_scalar or spec.head_dim)
    if spec.multi_head_latent_attention and spec.rope_scaling_type == "yarn":
        scale *= yarn_scale(spec.rope_scaling_factor, spec.rope_scaling_mscale_all_dim) ** 2
    return scale


class CoreAttention(nn.Module):
    """query [seq, batch, heads / tp, dim], key and value [key seq, batch, groups / tp, dim] -> [seq, batch, heads x dim / tp]."""

    def __init__(self, config: Any, layer_number: int, spec: ModelSpec, **_: Any) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.attention_dropout
        slopes = None
        if spec.position_embedding_type == "alibi":
            tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
            slopes = alibi_slopes(spec.num_attention_heads).chunk(tp)[rank]
        self.variant = Variant(softmax_scale(spec), window=spec.layer(layer_number - 1).window, softcap=spec.attn_logit_softcapping,
                               slopes=slopes)
        self.cut = ContextParallel(config.sequence_cut) if config.context_parallel_size > 1 else None

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
        attend = ops.attention if self.cut is None else self.cut
        with self._draws(variant.dropout):
            return attend(query, key, value, variant).flatten(2)

    def _draws(self, dropout: float) -> AbstractContextManager[None]:
        """The generator that tensor-parallel ranks, which have other heads, do not share; with sequence parallelism a whole layer
        is under it."""
        if not dropout or self.config.sequence_parallel:
            return nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork
