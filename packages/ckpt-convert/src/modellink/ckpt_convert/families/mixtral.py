# SPDX-License-Identifier: Apache-2.0
"""Mixtral: a Mistral in which every layer is a mixture of experts."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.families.mistral import Mistral
from modellink.ckpt_convert.family import LLAMA_NAMES, Key
from modellink.ckpt_convert.rules import same, stack


@register
class Mixtral(Mistral):
    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    keys = Mistral.keys | {"num_experts": Key("num_local_experts"),
                           "moe_router_topk": Key("num_experts_per_tok")}
    defaults = {"sliding_window": None, "rope_theta": 1000000.0}
    names = LLAMA_NAMES | {
        "mlp.router": same("block_sparse_moe.gate"),
        "mlp.experts.linear_fc1": stack("block_sparse_moe.experts.{expert}.w1",
                                        "block_sparse_moe.experts.{expert}.w3"),
        "mlp.experts.linear_fc2": same("block_sparse_moe.experts.{expert}.w2")}
