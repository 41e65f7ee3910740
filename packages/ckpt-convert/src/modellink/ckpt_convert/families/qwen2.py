"""Qwen1.5, Qwen2, Qwen2.5: a Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.families.llama import Llama
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError


@register
class Qwen2(Llama):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def read(self, config: Config) -> dict[str, Any]:
        config.refuse("use_sliding_window", False)
        return super().read(config) | {"add_qkv_bias": True, "add_dense_bias": False}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        if not spec.add_qkv_bias or spec.add_dense_bias:
            raise ModelLinkError("a qwen2 has biases on query, key and value and nowhere else in the attention",
                                 where="add_qkv_bias, add_dense_bias")
        config = super().write(spec.__class__(**spec.to_dict() | {"add_dense_bias": True}))
        del config["attention_bias"], config["mlp_bias"]
        return config | {"use_sliding_window": False}
