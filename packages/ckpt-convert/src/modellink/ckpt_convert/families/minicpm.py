# SPDX-License-Identifier: Apache-2.0
"""MiniCPM and its mixture of experts: a Llama with scales on embedding, residual branches and head."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, LLAMA_NAMES, Family, Key, inverted, without
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import same, stack
from modellink.ckpt_convert.spec import ModelSpec


@register
class MiniCPM(Family):
    model_type = "minicpm"
    architecture = "MiniCPMForCausalLM"
    others = ("MiniCPMMoEForCausalLM", "minicpm-moe")
    keys = without(LLAMA_KEYS, "kv_channels") | {
        "embedding_multiplier_scale": Key("scale_emb", 1.0), "scale_depth": Key("scale_depth", 1.0),
        "num_experts": Key("num_experts", None, read=lambda count: count or None),
        "moe_router_topk": Key("num_experts_per_tok", None),
        "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", True)}
    fixed = {"attention_bias": False}
    names = LLAMA_NAMES | {
        "mlp.router": same("mlp.gate"),
        "mlp.experts.linear_fc1": stack("mlp.experts.{expert}.w1", "mlp.experts.{expert}.w3"),
        "mlp.experts.linear_fc2": same("mlp.experts.{expert}.w2")}

    def read(self, config: Config) -> dict[str, Any]:
        values = super().read(config)
        hidden = config.count("hidden_size")
        return values | {"output_multiplier_scale": config.get("dim_model_base", 1) / hidden}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        base = spec.output_multiplier_scale * spec.hidden_size
        return super().write(spec) | {"dim_model_base": round(base) if abs(base - round(base)) < 1e-6
                                      else base}
