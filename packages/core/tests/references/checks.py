# SPDX-License-Identifier: Apache-2.0
"""What the tests of the references share: loading one, random tensors for it, and comparing it with a transformers model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor

FOLDER = Path(__file__).parent
Tensors = dict[str, Tensor]


def load(family: str) -> ModuleType:
    """A reference by its path: tests are no importable package."""
    spec = importlib.util.spec_from_file_location(f"reference_{family}", FOLDER / f"{family}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path.stem) for path in sorted(FOLDER.glob("*.py")) if path.stem not in ("blocks", "checks")}
CASES = [(family, name) for family, module in MODULES.items() for name in module.TINY]


def random_tensors(module: ModuleType, config: dict[str, Any], seed: int = 0) -> Tensors:
    """Weights of which each one matters; norms around one, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in module.shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            value = noise / math.sqrt(shape[1])
        else:
            value = 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
        tensors[name] = value.requires_grad_()
    return tensors


def tokens(length: int = 24) -> Tensor:
    return torch.randint(0, 131, (2, length), generator=torch.Generator().manual_seed(4))


def gradients(logits: Tensor, tensors: Tensors) -> Tensors:
    """Of a random linear function of the logits; zeros where a tensor has no part in it."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) / logits.numel() ** 0.5
    found = torch.autograd.grad((logits * weights).sum(), list(tensors.values()), materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def assert_equal(
    module: ModuleType, config: dict[str, Any], model: torch.nn.Module, rename: Callable[[Tensors], Tensors], **arguments: Tensor
) -> None:
    """The reference and a transformers model fed with the renamed tensors agree in logits and in every gradient."""
    tensors = random_tensors(module, config)
    ours = module.logits(config, tensors, tokens())
    renamed = rename(tensors)
    wanted = {name for name, _ in model.named_parameters()}
    assert set(renamed) == wanted
    theirs = torch.func.functional_call(model, renamed, (tokens(),), arguments).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    expected = gradients(theirs, tensors)
    for name, gradient in gradients(ours, tensors).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def build(name: str, **sizes: Any) -> torch.nn.Module:
    """A transformers causal model in fp32 with eager attention."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def llama(config: dict[str, Any], **changes: Any) -> torch.nn.Module:
    """The Llama of a configuration that speaks Llama's words."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
            "num_key_value_heads", "max_position_embeddings", "rope_theta", "tie_word_embeddings")
    return build("Llama", **{key: config[key] for key in keys if key in config} | changes)
