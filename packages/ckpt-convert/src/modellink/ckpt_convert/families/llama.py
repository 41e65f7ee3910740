# SPDX-License-Identifier: Apache-2.0
"""Llama 1 to 3.3, CodeLlama, Yi, SmolLM2, and everything that uses `model_type: llama`."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec


@register
class Llama(Family):
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    others = ("Yi", "YiForCausalLM", "LLaMAForCausalLM")
    keys = LLAMA_KEYS | {"add_dense_bias": Key("attention_bias", False),
                         "add_mlp_bias": Key("mlp_bias", False)}

    def read(self, config: Config) -> dict[str, Any]:
        # the key of the oldest files
        longest = config.get("max_position_embeddings", config.get("max_sequence_length"))
        values = super().read(config.changed({"max_position_embeddings": longest}))
        return values | {"add_qkv_bias": values["add_dense_bias"]}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return super().write(spec) | {"head_dim": spec.head_dim}
