# SPDX-License-Identifier: Apache-2.0
"""InternLM2: a Llama whose query, key and value are one tensor, group by group, as in Megatron."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key, without
from modellink.ckpt_convert.rules import same, stack


@register
class InternLM2(Family):
    model_type = "internlm2"
    architecture = "InternLM2ForCausalLM"
    keys = without(LLAMA_KEYS, "kv_channels") | {"add_qkv_bias": Key("bias", True),
                                                 "add_dense_bias": Key("bias", True)}
    names = {
        "embedding.word_embeddings": same("model.tok_embeddings"),
        "input_layernorm": same("attention_norm"),
        "self_attention.linear_qkv": same("attention.wqkv"),
        "self_attention.linear_proj": same("attention.wo"),
        "pre_mlp_layernorm": same("ffn_norm"),
        "mlp.linear_fc1": stack("feed_forward.w1", "feed_forward.w3"),
        "mlp.linear_fc2": same("feed_forward.w2"),
        "decoder.final_layernorm": same("model.norm"),
        "output_layer": same("output")}
