# SPDX-License-Identifier: Apache-2.0
"""A model family of a third party: SmolLM3, a Llama in which some layers have no rotary embedding."""

from __future__ import annotations

from typing import Any, ClassVar

from modellink.ckpt_convert.families import register
from modellink.ckpt_convert.family import Family
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec


@register
class SmolLM3(Family):
    model_type = "smollm3-plugin"
    architecture = "SmolLM3ForCausalLM"
    fixed: ClassVar[dict[str, Any]] = {"use_sliding_window": False}

    def read(self, config: Config) -> dict[str, Any]:
        values = super().read(config)
        bases = tuple(values["rotary_base"] * has_rope for has_rope in config.need("no_rope_layers"))
        return values | {"layer_rotary_bases": bases}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return super().write(spec) | {"no_rope_layers": [int(layer.rope is not None) for layer in spec.layers]}
