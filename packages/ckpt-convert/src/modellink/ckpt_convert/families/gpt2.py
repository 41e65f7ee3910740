# SPDX-License-Identifier: Apache-2.0
"""GPT-2 and GPT-3's shape: LayerNorm, biases everywhere, learned positions; matrices are stored [in, out]."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import ACTIVATIONS, Family, Key, inverted
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import packed, same
from modellink.ckpt_convert.spec import ModelSpec


@register
class GPT2(Family):
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    keys = {"num_layers": Key("n_layer"), "hidden_size": Key("n_embd"), "num_attention_heads": Key("n_head"),
            "ffn_hidden_size": Key("n_inner", None), "vocab_size": Key("vocab_size"),
            "max_position_embeddings": Key("n_positions"), "norm_epsilon": Key("layer_norm_epsilon", 1e-5),
            "activation_func": Key("activation_function", "gelu_new", values=ACTIVATIONS),
            "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", True)}
    features = {"normalization": "LayerNorm", "gated_linear_unit": False, "add_qkv_bias": True,
                "add_dense_bias": True, "add_mlp_bias": True, "position_embedding_type": "learned_absolute"}
    fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
             "add_cross_attention": False}
    inert = ("n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
             "summary_type", "summary_use_proj")
    prefix = "transformer."
    buffers = (".attn.bias", ".attn.masked_bias")
    layer = "transformer.h.{layer}."
    names = {
        "embedding.word_embeddings": same("transformer.wte"),
        "embedding.position_embeddings": same("transformer.wpe"),
        "input_layernorm": same("ln_1"),
        "self_attention.linear_qkv": packed("attn.c_attn", transposed=True),
        "self_attention.linear_proj": same("attn.c_proj", transposed=True),
        "pre_mlp_layernorm": same("ln_2"),
        "mlp.linear_fc1": same("mlp.c_fc", transposed=True),
        "mlp.linear_fc2": same("mlp.c_proj", transposed=True),
        "decoder.final_layernorm": same("transformer.ln_f"),
        "output_layer": same("lm_head")}

    def read_positions(self, config: Config) -> dict[str, Any]:
        return {}

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        return {}
