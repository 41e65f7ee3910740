# SPDX-License-Identifier: Apache-2.0
"""Which linears of a model get an adapter. Imports no torch."""

from __future__ import annotations

from modellink.ckpt_convert.lora_targets import meant_modules
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import Weight, weights
from modellink.core.config import LoraConfig
from modellink.kernels.errors import ModelLinkError


def targets(spec: ModelSpec, lora: LoraConfig) -> dict[str, Weight]:
    """The weights that get an adapter, by canonical name.

    Raises:
        ModelLinkError: the model has no such linear.
    """
    linears = {name: weight for name, weight in weights(spec).items() if ".linear_" in name and name.endswith(".weight")}
    known = sorted({linear(name) for name in linears})
    for module in lora.modules:
        if module not in known:
            raise ModelLinkError(f"the model has no linear {module}", where="--lora-target-modules",
                                 fix=meant_modules(module, known) or f"use some of {', '.join(known)}")
    return {name: weight for name, weight in linears.items() if linear(name) in lora.modules}


def linear(name: str) -> str:
    """The name of a weight's linear within its layer, e.g. linear_qkv."""
    return name.split(".")[-2]
