# SPDX-License-Identifier: Apache-2.0
"""Gemma: scaled embedding, gains of 1 + weight, gated GELU, tied."""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key, inverted
from modellink.ckpt_convert.hf_config import Config

HEAD = {"kv_channels": Key("head_dim"), "num_query_groups": Key("num_key_value_heads"),
        "untie_embeddings_and_output_weights": inverted("tie_word_embeddings",
                                                                                        True)}


@register
class Gemma(Family):
    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    # Public files have "gelu", which transformers reads as its tanh form, like Google's own code.
    keys = LLAMA_KEYS | HEAD | {"activation_func": Key("hidden_act", "gelu_pytorch_tanh", values={
        "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"})}
    features = {"layernorm_zero_centered_gamma": True}
    fixed = {"attention_bias": False, "use_bidirectional_attention": False}
    inert: ClassVar[tuple[str, ...]] = ("hidden_activation",)  # transformers reads hidden_act

    def read(self, config: Config) -> dict[str, Any]:
        values = super().read(config)
        return values | {"embedding_multiplier_scale": sqrt(values["hidden_size"])}
