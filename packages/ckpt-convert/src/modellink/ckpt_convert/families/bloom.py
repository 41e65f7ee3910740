# SPDX-License-Identifier: Apache-2.0
"""Bloom: LayerNorm, biases everywhere, ALiBi, a norm after the embedding; query, key and value are fused as
in Megatron."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family, Key, inverted
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import same
from modellink.ckpt_convert.spec import ModelSpec


@register
class Bloom(Family):
    model_type = "bloom"
    architecture = "BloomForCausalLM"
    keys = {"num_layers": Key("n_layer"), "hidden_size": Key("hidden_size"),
            "num_attention_heads": Key("n_head"), "vocab_size": Key("vocab_size"),
            "norm_epsilon": Key("layer_norm_epsilon", 1e-5),
            "max_position_embeddings": Key("seq_length", 2048),
            "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", True)}
    features = {"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": "gelu_tanh",
                "add_qkv_bias": True, "add_dense_bias": True, "add_mlp_bias": True, "embed_layernorm": True,
                "position_embedding_type": "alibi"}
    fixed = {"apply_residual_connection_post_layernorm": False}
    inert = ("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add",
             "skip_bias_add_qkv", "slow_but_exact")
    prefix = "transformer."
    layer = "transformer.h.{layer}."
    names = {
        "embedding.word_embeddings": same("transformer.word_embeddings"),
        "embedding.word_embeddings.norm": same("transformer.word_embeddings_layernorm"),
        "input_layernorm": same("input_layernorm"),
        "self_attention.linear_qkv": same("self_attention.query_key_value"),
        "self_attention.linear_proj": same("self_attention.dense"),
        "pre_mlp_layernorm": same("post_attention_layernorm"),
        "mlp.linear_fc1": same("mlp.dense_h_to_4h"),
        "mlp.linear_fc2": same("mlp.dense_4h_to_h"),
        "decoder.final_layernorm": same("transformer.ln_f"),
        "output_layer": same("lm_head")}

    def read(self, config: Config) -> dict[str, Any]:
        old = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "hidden_size": "n_embed"}
        renamed = {key: config.get(key, config.get(other)) for key, other in old.items()}
        return super().read(config.changed(renamed))

    def read_positions(self, config: Config) -> dict[str, Any]:
        return {}

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        return {}
