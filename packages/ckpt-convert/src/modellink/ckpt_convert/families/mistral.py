# SPDX-License-Identifier: Apache-2.0
"""Mistral: a Llama that may have a sliding window in every layer."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import LLAMA_KEYS, Family, Key


@register
class Mistral(Family):
    model_type = "mistral"
    architecture = "MistralForCausalLM"
    keys = LLAMA_KEYS | {"sliding_window": Key("sliding_window", None)}
