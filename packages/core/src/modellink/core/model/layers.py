# SPDX-License-Identifier: Apache-2.0
"""Which modules megatron-core's transformer layer is made of, for each layer of a ModelSpec."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from modellink.ckpt_convert.layer import LayerSpec
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.attention import CoreAttention, SelfAttention
from modellink.core.model.feed_forward import Experts, FeedForward, GroupedExperts, SharedExpert, linears
from modellink.core.model.latent import LatentAttention
from modellink.core.model.linear import BiasedRowLinear, ColumnLinear, RowLinear
from modellink.core.model.norm import Norm
from modellink.core.model.rotary import Rotary
from modellink.core.model.router import Router
from modellink.core.model.specialize import specialize
from modellink.core.parallel.experts import OVERLAPPED


class Layer(TransformerLayer):
    """megatron-core's layer, with the post norms and the scale of residual branches that some models have."""

    def __init__(self, config: Any, submodules: Any, *args: Any, spec: ModelSpec, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if isinstance(self.mlp, MoELayer) and config.balance.moe_permutation_async_comm:
            specialize(self.mlp.token_dispatcher, OVERLAPPED[type(self.mlp.token_dispatcher)])
        scale = 1.0 if spec.scale_depth is None else spec.scale_depth / math.sqrt(spec.num_layers)
        norms: list[Norm | None] = [None, None]
        if spec.layer(self.layer_number - 1).post_norm:
            self.post_attn_norm = Norm(config, spec.hidden_size, spec.norm_epsilon)
            self.post_mlp_layernorm = Norm(config, spec.hidden_size, spec.norm_epsilon)
            norms = [self.post_attn_norm, self.post_mlp_layernorm]
        self.self_attn_bda, self.mlp_bda = (_adder(norm, scale) for norm in norms)


def _adder(norm: Norm | None, scale: float) -> Callable[[bool, bool], Callable[..., Tensor]]:
    """The step after attention and feed-forward, in megatron-core's form (training, fused) -> function."""
    def add(training: bool, branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = branch
        x = x if bias is None else x + bias
        x = x if norm is None else norm(x)
        x = x if scale == 1.0 else x * scale
        return residual + nn.functional.dropout(x, dropout, training)
    return lambda training, fused: partial(add, training)


def layer_spec(spec: ModelSpec, number: int, rotary: Rotary, *, grouped: bool = False) -> ModuleSpec:
    """megatron-core's spec of a layer.

    Args:
        number: from 0, over all pipeline stages.
        grouped: compute the experts as one grouped product.
    """
    layer = spec.layer(number)
    core = ModuleSpec(module=CoreAttention, params={"spec": spec})
    projection = BiasedRowLinear if layer.dense_bias else RowLinear
    latent = {"spec": spec} if layer.attention == "latent" else {}
    attention = ModuleSpec(
        module=LatentAttention if latent else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rotary": rotary, **latent},
        submodules=SelfAttentionSubmodules(linear_qkv=ColumnLinear, core_attention=core, linear_proj=projection,
                                           q_layernorm=IdentityOp, k_layernorm=IdentityOp))
    return ModuleSpec(module=Layer, params={"spec": spec}, submodules=TransformerLayerSubmodules(
        input_layernorm=Norm, self_attention=attention, self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm, mlp=_feed_forward(layer, grouped), mlp_bda=get_bias_dropout_add))


def _feed_forward(layer: LayerSpec, grouped: bool) -> ModuleSpec:
    if layer.experts is None:
        return ModuleSpec(module=FeedForward, params={"ffn_hidden_size": layer.ffn}, submodules=linears(layer))
    experts = ModuleSpec(module=GroupedExperts if grouped else Experts, submodules=linears(layer))
    shared = ModuleSpec(module=SharedExpert, submodules=linears(layer))
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(router=Router, experts=experts, shared_experts=shared))


def block_spec(spec: ModelSpec, layers: range, *, grouped: bool = False) -> TransformerBlockSubmodules:
    """megatron-core's spec of a model chunk with these layers and, on the last stage, the final norm."""
    rotary = {rope: Rotary(rope) for rope in {spec.layer(number).rope for number in layers}}
    specs = [layer_spec(spec, number, rotary[spec.layer(number).rope], grouped=grouped) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)
