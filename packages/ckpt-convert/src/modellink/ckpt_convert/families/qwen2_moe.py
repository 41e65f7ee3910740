# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE: a Qwen2 whose layers have experts and a gated shared expert, which sees every token."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.families.qwen2 import Qwen2
from modellink.ckpt_convert.family import LLAMA_NAMES, Key, inverted
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import same, stack

SHARED = {"mlp.shared_experts.linear_fc1": stack("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
          "mlp.shared_experts.linear_fc2": same("mlp.shared_expert.down_proj"),
          "mlp.shared_experts.gate_weight": same("mlp.shared_expert_gate")}


@register
class Qwen2MoE(Qwen2):
    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    others = ("qwen2-moe",)
    keys = Qwen2.keys | {
        "add_qkv_bias": Key("qkv_bias", True), "num_experts": Key("num_experts"), "moe_router_topk": Key("num_experts_per_tok"),
        "moe_intermediate_size": Key("moe_intermediate_size"),
        "moe_router_pre_softmax": inverted("norm_topk_prob", False),
        "moe_shared_expert_intermediate_size": Key("shared_expert_intermediate_size")}
    features = {"shared_expert_gate": True}
    fixed = Qwen2.fixed | {"decoder_sparse_step": 1}
    names = LLAMA_NAMES | SHARED | {
        "mlp.router": same("mlp.gate"),
        "mlp.experts.linear_fc1": stack("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
        "mlp.experts.linear_fc2": same("mlp.experts.{expert}.down_proj")}

    def read(self, config: Config) -> dict[str, Any]:
        if config.get("mlp_only_layers"):
            config.refuse("mlp_only_layers", [])
        return super().read(config)
