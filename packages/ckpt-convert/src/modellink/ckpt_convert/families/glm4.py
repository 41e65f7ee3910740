# SPDX-License-Identifier: Apache-2.0
"""GLM-4 in transformers' own form: gate and up are one tensor, half of each head is rotated in adjacent
pairs."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, LLAMA_NAMES, Family, Key
from modellink.ckpt_convert.hf_config import Config, read_rope
from modellink.ckpt_convert.rules import same

HALF = {"partial_rotary_factor": 0.5}  # the default, as the public files lack the key


@register
class Glm(Family):
    model_type = "glm"
    architecture = "GlmForCausalLM"
    keys = LLAMA_KEYS | {"add_qkv_bias": Key("attention_bias", False)}
    features = {"rotary_interleaved": True}
    names = LLAMA_NAMES | {"mlp.linear_fc1": same("mlp.gate_up_proj")}

    def read_positions(self, config: Config) -> dict[str, Any]:
        return read_rope(Config(HALF | config.values, config.path))
