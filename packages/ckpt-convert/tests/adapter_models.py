# SPDX-License-Identifier: Apache-2.0
"""Random LoRA adapters of tiny models."""

from __future__ import annotations

import torch

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.lora import A, B, is_linear
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import OUTPUT, weights

CONFIG = AdapterConfig(r=4, alpha=6.0)


def adapter_of(spec: ModelSpec, r: int = 4, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Return random A and B of every linear layer except the router and the head."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, weight in weights(spec).items():
        if is_linear(name, weight) and name != OUTPUT and "router" not in name:
            module = name.removesuffix(".weight")
            found[module + A] = scale * torch.randn(r, weight.shape[1], generator=generator)
            found[module + B] = scale * torch.randn(weight.shape[0], r, generator=generator)
    return found


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of tensors are equal bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
