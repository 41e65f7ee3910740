# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family, with what they should compute: the table that parity tests run over.

No two sizes of a model are alike (heads, groups, head size, feed-forward width, an odd vocabulary), and every weight counts.
A model is made once, by the class transformers has for it or by the plain reference in `references/`, and kept as three files:
`weights/` and `gradients/` are Hugging Face folders, `expected.pt` holds logits and loss.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, LENGTH = 131, 24
SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 20, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EIGHTH = SIZES | {"head_dim": 8}  # classes that know no other head size than hidden / heads
WINDOW = {"sliding_window": 7}  # positions beyond one window
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LATENT = SIZES | {"num_key_value_heads": 6, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
                  "head_dim": 8, "rms_norm_eps": 1e-4, "n_routed_experts": 8, "num_experts_per_tok": 3,
                  "moe_intermediate_size": 28, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": False}
MIXTURE = EIGHTH | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
                    "shared_expert_intermediate_size": 36, "decoder_sparse_step": 1}
GPT = {"n_layer": 4, "n_head": 6, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "llama biased": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama llama3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama llama3 tied": ("Llama", SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama linear": ("Llama", SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "qwen2": ("Qwen2", EIGHTH),
    "qwen2 tied": ("Qwen2", EIGHTH | {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", EIGHTH | {"rope_parameters": YARN}),
    "mistral": ("Mistral", SIZES | {"sliding_window": None}),
    "mistral window": ("Mistral", SIZES | WINDOW),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}),
    "qwen2_moe": ("Qwen2Moe", MIXTURE | {"norm_topk_prob": False}),
    "qwen2_moe normalized": ("Qwen2Moe", MIXTURE | {"norm_topk_prob": True}),
    "gemma": ("Gemma", SIZES | {"rms_norm_eps": 1e-6}),
    "gemma2": ("Gemma2", SIZES | WINDOW | {"query_pre_attn_scalar": 11, "attn_logit_softcapping": 3.0,
                                           "final_logit_softcapping": 5.0}),
    "bloom": ("Bloom", GPT | {"hidden_size": 48}),
    "gpt2": ("GPT2", GPT | {"n_embd": 48, "n_inner": 112, "n_positions": 64}),
    "gpt2 gelu": ("GPT2", GPT | {"n_embd": 48, "n_inner": 112, "n_positions": 64, "activation_function": "gelu"}),
    "deepseek_v2": ("DeepseekV2", LATENT | {
        "q_lora_rank": 28, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    "deepseek_v2 lite": ("DeepseekV2", LATENT | {
        "q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}})}
REFERENCES = Path(__file__).parent / "references"


def reference(family: str) -> ModuleType:
    """A plain reference by its path: tests are no importable package."""
    spec = importlib.util.spec_from_file_location(f"reference_{family}", REFERENCES / f"{family}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[str]:
    """Names of all models: those of transformers' classes, then `family: variant` of the references."""
    files = [path.stem for path in sorted(REFERENCES.glob("*.py")) if path.stem not in ("blocks", "checks")]
    return [*TRANSFORMERS, *(f"{family}: {name}" for family in files for name in reference(family).TINY)]


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(4))


def make(case: str, folder: Path) -> None:
    """Write the model, its gradients and what it computes."""
    _from_transformers(case, folder) if case in TRANSFORMERS else _from_reference(*case.split(": "), folder)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _from_transformers(case: str, folder: Path) -> None:
    import transformers

    name, values = TRANSFORMERS[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # no dropout
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            small = parameter.dim() < 2
            parameter.add_(0.2 * torch.randn_like(parameter)) if small else parameter.mul_(
                9 if key.endswith("mlp.gate.weight") else 3)
    model.save_pretrained(folder / "weights")
    ids = tokens()
    logits = model(ids[:, :-1]).logits
    loss = loss_of(logits, ids)
    loss.backward()
    torch.save({"logits": logits.detach(), "loss": loss.item()}, folder / "expected.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder / "gradients")


def _from_reference(family: str, name: str, folder: Path) -> None:
    module = reference(family)
    config, generator = module.TINY[name], torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in module.shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        large = noise * 1.3 / math.sqrt(shape[-1])
        weights[key] = (large if len(shape) > 1 else 0.2 * noise + (0 if key.endswith("bias") else 1)).requires_grad_()
    ids = tokens()
    logits = module.logits(config, weights, ids[:, :-1])
    loss = loss_of(logits, ids)
    loss.backward()
    torch.save({"logits": logits.detach(), "loss": loss.item()}, folder / "expected.pt")
    for place, tensors in [("weights", weights), ("gradients", {key: tensor.grad for key, tensor in weights.items()})]:
        (folder / place).mkdir()
        save_file({key: tensor.detach() for key, tensor in tensors.items()}, folder / place / "model.safetensors")
        (folder / place / "config.json").write_text(json.dumps(config))
