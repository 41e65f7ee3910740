# SPDX-License-Identifier: Apache-2.0
"""GLM-4 in transformers' own form: gate and up are one tensor, half of each head is rotated in adjacent
pairs."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, LLAMA_NAMES, Family, Key
from modellink.ckpt_convert.rules import same


@register
class Glm(Family):
    model_type = "glm"
    architecture = "GlmForCausalLM"
    keys = LLAMA_KEYS | {"add_qkv_bias": Key("attention_bias", True), "kv_channels": Key("head_dim"),
                         "num_query_groups": Key("num_key_value_heads")}
    features = {"rotary_interleaved": True}
    defaults = {"partial_rotary_factor": 0.5}  # public files lack the key
    names = LLAMA_NAMES | {"mlp.linear_fc1": same("mlp.gate_up_proj")}
