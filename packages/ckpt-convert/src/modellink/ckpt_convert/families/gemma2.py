# SPDX-License-Identifier: Apache-2.0
"""Gemma2: a Gemma with four norms per layer, soft caps, and a sliding window in every second layer, or in those
that `layer_types` names."""

from __future__ import annotations

from typing import Any

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.families.gemma import HEAD, Gemma
from modellink.ckpt_convert.family import ACTIVATIONS, LLAMA_KEYS, LLAMA_NAMES, Key
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import same
from modellink.ckpt_convert.spec import ModelSpec

SLIDING, FULL = "sliding_attention", "full_attention"


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
    defaults = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    inert = ("hidden_act", "sliding_window_size")
    features = Gemma.features | {"post_norm": True, "window_attn_skip_freq": 2}
    names = LLAMA_NAMES | {
        "post_attn_norm": same("post_attention_layernorm"),
        "pre_mlp_layernorm": same("pre_feedforward_layernorm"),
        "post_mlp_layernorm": same("post_feedforward_layernorm")}

    def read(self, config: Config) -> dict[str, Any]:
        values = super().read(config)
        kinds = config.per_layer("layer_types", SLIDING, FULL)
        if kinds is None or kinds == _alternating(len(kinds)):
            return values
        window = values.pop("sliding_window")
        del values["window_attn_skip_freq"]
        return values | {"layer_windows": tuple(window * (kind == SLIDING) for kind in kinds)}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        if spec.layer_windows is None:
            return super().write(spec)
        kinds = [SLIDING if window else FULL for window in spec.layer_windows]
        return super().write(spec) | {"layer_types": kinds, "sliding_window": max(spec.layer_windows) or 1}


def _alternating(count: int) -> list[str]:
    return [FULL if number % 2 else SLIDING for number in range(count)]
