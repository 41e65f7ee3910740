# SPDX-License-Identifier: Apache-2.0
"""InternLM of the first generation: a Llama with attention biases if `bias` is true."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key, without
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec


@register
class InternLM(Family):
    model_type = "internlm"
    architecture = "InternLMForCausalLM"
    keys = without(LLAMA_KEYS, "num_query_groups", "kv_channels") | {
        "add_qkv_bias": Key("bias", True), "add_dense_bias": Key("bias", True)}

    def read_positions(self, config: Config) -> dict[str, Any]:
        rotary = Config(config.get("rotary", {}), config.path)
        rotary.refuse("type", "origin", "dynamic")
        values: dict[str, Any] = {"rotary_base": float(rotary.get("base", 10000))}
        if rotary.get("type") == "dynamic":
            values |= {"rope_scaling_type": "dynamic",
                       "rope_scaling_factor": float(rotary.get("scaling_factor", 1.0)),
                       "original_max_position_embeddings": config.count("max_position_embeddings")}
        return values

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        if spec.rope_scaling_type is None:
            return {"rotary": {"base": spec.rotary_base, "type": "origin"}}
        return {"rotary": {"base": spec.rotary_base, "type": spec.rope_scaling_type,
                           "scaling_factor": spec.rope_scaling_factor}}
