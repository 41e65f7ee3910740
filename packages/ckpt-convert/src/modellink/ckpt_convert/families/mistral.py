# SPDX-License-Identifier: Apache-2.0
"""Mistral: a Llama that may have a sliding window in every layer."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key


@register
class Mistral(Family):
    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults = {"sliding_window": 4096}
    keys = LLAMA_KEYS | {"num_query_groups": Key("num_key_value_heads"), "sliding_window": Key("sliding_window", None)}
