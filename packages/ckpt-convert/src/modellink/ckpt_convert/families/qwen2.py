# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5, CodeQwen1.5, Qwen2, Qwen2.5: a Llama with biases on query, key and value."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family


@register
class Qwen2(Family):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    features = {"add_qkv_bias": True}
    fixed = {"use_sliding_window": False}
