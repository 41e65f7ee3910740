# SPDX-License-Identifier: Apache-2.0
"""ChatGLM3 and GLM-4: few key groups, half of each head rotated in adjacent pairs, biases on query, key and
value."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family, Key, inverted
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import packed, same
from modellink.ckpt_convert.spec import ModelSpec


@register
class ChatGLM(Family):
    model_type = "chatglm"
    architecture = "ChatGLMForConditionalGeneration"
    others = ("ChatGLMModel", "chatglm3")
    keys = {"num_layers": Key("num_layers"), "hidden_size": Key("hidden_size"),
            "vocab_size": Key("padded_vocab_size"), "num_attention_heads": Key("num_attention_heads"),
            "num_query_groups": Key("multi_query_group_num"), "kv_channels": Key("kv_channels", None),
            "ffn_hidden_size": Key("ffn_hidden_size"), "max_position_embeddings": Key("seq_length"),
            "norm_epsilon": Key("layernorm_epsilon"), "add_qkv_bias": Key("add_qkv_bias", False),
            "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", False),
            "rotary_base": Key("rope_ratio", 1, read=lambda ratio: 10000.0 * ratio,
                               write=lambda base: base / 10000.0)}
    features = {"rotary_percent": 0.5, "rotary_interleaved": True}
    fixed = {"add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
             "multi_query_attention": True, "apply_residual_connection_post_layernorm": False,
             "original_rope": True, "fp32_residual_connection": False}
    inert = ("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout",
             "num_hidden_layers", "quantization_bit", "pre_seq_len", "prefix_projection", "rope_theta", "vocab_size")
    buffers = ("rotary_pos_emb.inv_freq",)
    layer = "transformer.encoder.layers.{layer}."
    names = {
        "embedding.word_embeddings": same("transformer.embedding.word_embeddings"),
        "input_layernorm": same("input_layernorm"),
        "self_attention.linear_qkv": packed("self_attention.query_key_value"),
        "self_attention.linear_proj": same("self_attention.dense"),
        "pre_mlp_layernorm": same("post_attention_layernorm"),
        "mlp.linear_fc1": same("mlp.dense_h_to_4h"),
        "mlp.linear_fc2": same("mlp.dense_4h_to_h"),
        "decoder.final_layernorm": same("transformer.encoder.final_layernorm"),
        "output_layer": same("transformer.output_layer")}

    def read_positions(self, config: Config) -> dict[str, Any]:
        return {}

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        return {}
