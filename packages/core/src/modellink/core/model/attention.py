"""Self-attention over megatron-core's parallel linears: rotary by position, a cache where there is one, one fused op.

megatron-core's own forward ignores position ids, so its parameters and split into heads are kept and the way between is ours.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from torch import Tensor, nn

from modellink.core.model.rotary import RotaryTable
from modellink.core.model.state import SequenceState
from modellink.kernels import ops


class SelfAttention(MegatronSelfAttention):
    """hidden [seq (/ tp with sequence parallel), batch, hidden] -> the same."""

    def __init__(self, *args: Any, rotary: RotaryTable, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = rotary

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: SequenceState | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        state = packed_seq_params or SequenceState()
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if state.angles is None:
            state.angles = self._angles(state, query)
        cos, sin = state.angles
        query, key = ops.rotary(query, cos, sin), ops.rotary(key, cos, sin)
        if state.cache is not None:
            key, value = state.cache.update(self.layer_number, key, value, state.positions)
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(query, key, value, attention_mask, packed_seq_params=state)
        else:
            context = self.core_attention(query, key, value, attention_mask, packed_seq_params=state)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context)
        return output

    def _angles(self, state: SequenceState, query: Tensor) -> tuple[Tensor, Tensor]:
        length = state.length
        if length is None:
            length = query.size(0) if state.positions is None else int(state.positions.max()) + 1
        return self.rotary(length, state.positions, query.device, query.dtype)


class CoreAttention(nn.Module):
    """query [seq, batch, heads / tp, dim], key and value [key seq, batch, groups / tp, dim] -> [seq, batch, heads x dim / tp]."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
                packed_seq_params: SequenceState | None = None, **_: Any) -> Tensor:
        state = packed_seq_params or SequenceState()
        return ops.attention(query, key, value, scale=self.scale, dropout=self.dropout if self.training else 0.0,
                             positions=state.positions if state.cache is not None else None).flatten(2)


class BiasedRowParallelLinear(RowParallelLinear):
    """The output projection of models that have a bias there but in no other linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))
