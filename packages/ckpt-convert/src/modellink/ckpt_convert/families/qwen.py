# SPDX-License-Identifier: Apache-2.0
"""Qwen of the first generation: one tensor [query; key; value] with bias, the feed-forward size in its config
counts gate and up.

`use_dynamic_ntk` and `use_logn_attn` only act in evaluation beyond `seq_length`, and are not supported.
"""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family, Key, inverted
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import packed, same, stack
from modellink.ckpt_convert.spec import ModelSpec


@register
class Qwen(Family):
    model_type = "qwen"
    architecture = "QWenLMHeadModel"
    keys = {"num_layers": Key("num_hidden_layers"), "hidden_size": Key("hidden_size"),
            "vocab_size": Key("vocab_size"), "num_attention_heads": Key("num_attention_heads"),
            "kv_channels": Key("kv_channels", None),
            "ffn_hidden_size": Key("intermediate_size", read=lambda both: both // 2,
                                   write=lambda width: 2 * width),
            "max_position_embeddings": Key("seq_length"), "norm_epsilon": Key("layer_norm_epsilon"),
            "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", False),
            "rotary_base": Key("rotary_emb_base", 10000.0)}
    features = {"add_qkv_bias": True}
    fixed = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
    inert = ("attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "max_position_embeddings", "onnx_safe",
             "rope_theta", "softmax_in_fp32", "use_cache_kernel", "use_cache_quantization", "use_flash_attn")
    layer = "transformer.h.{layer}."
    names = {
        "embedding.word_embeddings": same("transformer.wte"),
        "input_layernorm": same("ln_1"),
        "self_attention.linear_qkv": packed("attn.c_attn"),
        "self_attention.linear_proj": same("attn.c_proj"),
        "pre_mlp_layernorm": same("ln_2"),
        "mlp.linear_fc1": stack("mlp.w2", "mlp.w1"),
        "mlp.linear_fc2": same("mlp.c_proj"),
        "decoder.final_layernorm": same("transformer.ln_f"),
        "output_layer": same("lm_head")}

    def read_positions(self, config: Config) -> dict[str, Any]:
        return {}

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        return {}
