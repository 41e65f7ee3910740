"""GLM-4 as transformers itself reads it: gate and up are one tensor, half of each head is rotated in neighbouring pairs."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, LLAMA_NAMES, Family, Key
from modellink.ckpt_convert.hf_config import Config, read_rope
from modellink.ckpt_convert.rules import same

HALF = {"partial_rotary_factor": 0.5}  # where the key is missing, as in the public files


@register
class Glm(Family):
    model_type = "glm"
    architecture = "GlmForCausalLM"
    keys = LLAMA_KEYS | {"add_qkv_bias": Key("attention_bias", False)}
    features = {"rotary_interleaved": True}
    names = LLAMA_NAMES | {"mlp.linear_fc1": same("mlp.gate_up_proj")}

    def read_positions(self, config: Config) -> dict[str, Any]:
        return read_rope(Config(HALF | config.values, config.path))
