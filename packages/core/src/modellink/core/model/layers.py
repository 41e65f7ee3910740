"""The layer spec: which module stands in which place of megatron-core's transformer layer."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.attention import BiasedRowParallelLinear, CoreAttention, SelfAttention
from modellink.core.model.norm import Norm
from modellink.core.model.rotary import RotaryTable
from modellink.kernels import ops


class GatedMLP(MLP):
    """fc1 (gate and up in one), SwiGLU, fc2."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        gate_and_up, _bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(ops.swiglu(gate_and_up))
        return output


def block_spec(spec: ModelSpec, layers: int) -> TransformerBlockSubmodules:
    """The spec of a pipeline stage of `layers` layers and, on the last one, the final norm."""
    projection = BiasedRowParallelLinear if spec.add_dense_bias else RowParallelLinear
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rotary": RotaryTable(spec)},
        submodules=SelfAttentionSubmodules(linear_qkv=ColumnParallelLinear, core_attention=CoreAttention,
                                           linear_proj=projection, q_layernorm=IdentityOp, k_layernorm=IdentityOp))
    layer = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        mlp=ModuleSpec(module=GatedMLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear,
                                                                 linear_fc2=RowParallelLinear)),
        mlp_bda=get_bias_dropout_add))
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)
