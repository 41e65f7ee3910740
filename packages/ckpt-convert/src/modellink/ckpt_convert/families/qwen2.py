# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5, CodeQwen1.5, Qwen2, Qwen2.5: a Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key
from modellink.ckpt_convert.hf_config import Config


@register
class Qwen2(Family):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    keys = LLAMA_KEYS | {"num_query_groups": Key("num_key_value_heads")}
    features = {"add_qkv_bias": True}
    fixed = {"use_sliding_window": False}
    inert = ("max_window_layers", "rotary_emb_base", "seq_length", "sliding_window")  # nothing without use_sliding_window

    def read(self, config: Config) -> dict[str, Any]:
        config.refuse("use_mrope", False)
        config.per_layer("layer_types", "full_attention")
        return super().read(config)
