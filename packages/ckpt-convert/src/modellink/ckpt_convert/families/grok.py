# SPDX-License-Identifier: Apache-2.0
"""Grok-1 as ported to Hugging Face: four norms per layer, scaled embedding and logits, capped scores,
GELU-gated experts."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key, inverted, without
from modellink.ckpt_convert.rules import grouped, same, stack
from modellink.ckpt_convert.spec import ModelSpec


def norm(module: str) -> Any:
    return same(module, kind="scale")


@register
class Grok1(Family):
    model_type = "grok-1"
    architecture = "Grok1ModelForCausalLM"
    keys = without(LLAMA_KEYS, "kv_channels", "activation_func") | {
        "embedding_multiplier_scale": Key("embedding_multiplier_scale", 1.0),
        "output_multiplier_scale": Key("output_multiplier_scale", 1.0),
        "query_pre_attn_scalar": Key("attn_output_multiplier", read=lambda scale: scale ** -2,
                                     write=lambda size: size ** -0.5),
        "attn_logit_softcapping": Key("max_attn_value", 30.0),
        "num_experts": Key("num_experts"), "moe_router_topk": Key("num_experts_per_tok"),
        "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", True)}
    features = {"post_norm": True, "activation_func": "gelu", "moe_router_pre_softmax": True}
    names = {
        "embedding.word_embeddings": same("model.embed_tokens"),
        "input_layernorm": norm("pre_attn_norm"),
        "self_attention.linear_qkv": grouped("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "self_attention.linear_proj": same("attn.o_proj"),
        "post_attn_norm": norm("post_attn_norm"),
        "pre_mlp_layernorm": norm("pre_moe_norm"),
        "mlp.router": same("moe_block.gate"),
        "mlp.experts.linear_fc1": stack("moe_block.experts.{expert}.linear",
                                        "moe_block.experts.{expert}.linear_v"),
        "mlp.experts.linear_fc2": same("moe_block.experts.{expert}.linear_1"),
        "post_mlp_layernorm": norm("post_moe_norm"),
        "decoder.final_layernorm": norm("model.norm"),
        "output_layer": same("lm_head")}

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        return {}
