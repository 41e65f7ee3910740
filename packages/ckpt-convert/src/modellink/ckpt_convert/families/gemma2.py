# SPDX-License-Identifier: Apache-2.0
"""Gemma2: a Gemma with four norms per layer, soft caps, and a sliding window in every second layer."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.families.gemma import HEAD, Gemma
from modellink.ckpt_convert.family import ACTIVATIONS, LLAMA_KEYS, LLAMA_NAMES, Key
from modellink.ckpt_convert.rules import same


@register
class Gemma2(Gemma):
    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    keys = LLAMA_KEYS | HEAD | {
        "activation_func": Key("hidden_activation", "gelu_pytorch_tanh", values=ACTIVATIONS),
        "query_pre_attn_scalar": Key("query_pre_attn_scalar",
                                     write=lambda value: int(value) if value == int(value) else value),
        "attn_logit_softcapping": Key("attn_logit_softcapping", None),
        "output_logit_softcapping": Key("final_logit_softcapping", None),
        "sliding_window": Key("sliding_window")}
    features = Gemma.features | {"post_norm": True, "window_attn_skip_freq": 2}
    names = LLAMA_NAMES | {
        "post_attn_norm": same("post_attention_layernorm"),
        "pre_mlp_layernorm": same("pre_feedforward_layernorm"),
        "post_mlp_layernorm": same("post_feedforward_layernorm")}
