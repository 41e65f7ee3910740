# SPDX-License-Identifier: Apache-2.0
"""Aquila and Aquila2: a Llama under another name."""

from __future__ import annotations

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family


@register
class Aquila(Family):
    model_type = "aquila"
    architecture = "AquilaForCausalLM"
    others = ("AquilaModel",)
    fixed = {"attention_bias": False}
