# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 and V2-Lite: latent attention, experts chosen from groups, shared experts, dense first layers."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, LLAMA_NAMES, Family, Key, inverted, without
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import same, stack
from modellink.ckpt_convert.spec import ModelSpec

LATENT_EPSILON = 1e-6  # of the latent norms, whatever rms_norm_eps is


@register
class DeepSeekV2(Family):
    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    others = ("deepseek2", "deepseek2-lite")
    keys = without(LLAMA_KEYS, "num_query_groups", "kv_channels") | {
        "q_lora_rank": Key("q_lora_rank", None), "kv_lora_rank": Key("kv_lora_rank"),
        "v_head_dim": Key("v_head_dim"), "qk_nope_head_dim": Key("qk_nope_head_dim"),
        "qk_rope_head_dim": Key("qk_rope_head_dim"), "num_experts": Key("n_routed_experts", None),
        "moe_router_topk": Key("num_experts_per_tok", None), "moe_intermediate_size": Key("moe_intermediate_size"),
        "first_k_dense_replace": Key("first_k_dense_replace", 0), "moe_layer_freq": Key("moe_layer_freq", 1),
        "moe_router_pre_softmax": inverted("norm_topk_prob", False),
        "routed_scaling_factor": Key("routed_scaling_factor", 1.0)}
    features = {"multi_head_latent_attention": True, "rotary_interleaved": True}
    fixed = {"attention_bias": False, "mlp_bias": False, "scoring_func": "softmax"}
    stated = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "q_lora_rank")
    inert = ("aux_loss_alpha", "ep_size", "head_dim", "n_group", "qk_head_dim", "seq_aux", "topk_group")
    names = without(LLAMA_NAMES, "self_attention.linear_qkv") | {
        "self_attention.linear_q_proj": same("self_attn.q_proj"),
        "self_attention.linear_q_down_proj": same("self_attn.q_a_proj"),
        "self_attention.q_layernorm": same("self_attn.q_a_layernorm"),
        "self_attention.linear_q_up_proj": same("self_attn.q_b_proj"),
        "self_attention.linear_kv_down_proj": same("self_attn.kv_a_proj_with_mqa"),
        "self_attention.kv_layernorm": same("self_attn.kv_a_layernorm"),
        "self_attention.linear_kv_up_proj": same("self_attn.kv_b_proj"),
        "mlp.router": same("mlp.gate"),
        "mlp.experts.linear_fc1": stack("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
        "mlp.experts.linear_fc2": same("mlp.experts.{expert}.down_proj"),
        "mlp.shared_experts.linear_fc1": stack("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        "mlp.shared_experts.linear_fc2": same("mlp.shared_experts.down_proj")}

    def read(self, config: Config) -> dict[str, Any]:
        config.refuse("topk_method", "greedy", "group_limited_greedy")
        values = super().read(config)
        config.refuse("num_key_value_heads", values["num_attention_heads"])
        if values["norm_epsilon"] != LATENT_EPSILON:
            values["latent_norm_epsilon"] = LATENT_EPSILON
        if config.get("norm_topk_prob"):  # the authors' code either normalizes or scales, and a single score is only scaled
            several = values.get("moe_router_topk", 1) > 1
            values |= {"routed_scaling_factor": 1.0} if several else {"moe_router_pre_softmax": True}
        if shared := config.get("n_shared_experts"):
            values["moe_shared_expert_intermediate_size"] = shared * values["moe_intermediate_size"]
        if config.get("topk_method") == "group_limited_greedy":
            values |= {"moe_router_num_groups": config.count("n_group"), "topk_group": config.count("topk_group")}
        return values

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        groups = {"n_group": spec.moe_router_num_groups, "topk_group": spec.topk_group}
        return super().write(spec) | groups | {
            "topk_method": "group_limited_greedy" if spec.topk_group else "greedy",
            "n_shared_experts": (spec.moe_shared_expert_intermediate_size or 0) // spec.expert_ffn or None,
            "num_key_value_heads": spec.num_attention_heads}
