# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every family and feature as ModelSpecs, and Hugging Face folders with random weights.

All sizes differ (heads, groups, head size, hidden sizes, an odd vocabulary). The names and shapes of a folder come from the
family's own rules, so these models prove that nothing is lost between formats; `public/` proves that names and shapes are those
of the public releases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.family import config_of
from modellink.ckpt_convert.rules import inverse
from modellink.ckpt_convert.spec import ModelSpec

SIZES: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 20, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 6,
    "ffn_hidden_size": 36, "vocab_size": 131, "max_position_embeddings": 64}
SQUARE = SIZES | {"hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 4}  # as many keys as heads
GROUPED = SQUARE | {"num_query_groups": 2}
BIASED = {"add_qkv_bias": True, "add_dense_bias": True}
TIED = {"untie_embeddings_and_output_weights": False}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2}
WIDE_EXPERTS = EXPERTS | {"moe_intermediate_size": 14}
LAYER_NORM = BIASED | {"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": "gelu_tanh",
                       "add_mlp_bias": True}
FOUR_NORMS = {"layernorm_zero_centered_gamma": True, "activation_func": "gelu_tanh", "embedding_multiplier_scale": 20 ** 0.5}
SHARED = {"moe_shared_expert_intermediate_size": 28}
LATENT = SQUARE | WIDE_EXPERTS | SHARED | {
    "kv_channels": 20, "multi_head_latent_attention": True, "rotary_interleaved": True, "kv_lora_rank": 10, "v_head_dim": 6,
    "latent_norm_epsilon": 1e-6,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "first_k_dense_replace": 1, "moe_router_pre_softmax": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama tied": ("llama", SIZES | TIED),
    "llama biased": ("llama", SIZES | BIASED | {"add_mlp_bias": True}),
    "aquila": ("aquila", SIZES),
    "baichuan": ("baichuan", SQUARE),
    "baichuan2 alibi": ("baichuan", SQUARE | {"position_embedding_type": "alibi", "normalize_output_weights": True}),
    "bloom": ("bloom", SQUARE | LAYER_NORM | TIED | {
        "ffn_hidden_size": 96, "embed_layernorm": True, "position_embedding_type": "alibi"}),
    "chatglm": ("chatglm", SIZES | {
        "kv_channels": 8, "add_qkv_bias": True, "rotary_percent": 0.5, "rotary_interleaved": True}),
    "deepseek_v2": ("deepseek_v2", LATENT | {"q_lora_rank": 14, "moe_router_num_groups": 2, "topk_group": 1}),
    "deepseek_v2 lite": ("deepseek_v2", LATENT),
    "gemma": ("gemma", SIZES | TIED | FOUR_NORMS),
    "gemma2": ("gemma2", SIZES | TIED | FOUR_NORMS | {
        "post_norm": True, "sliding_window": 7, "window_attn_skip_freq": 2, "query_pre_attn_scalar": 11.0}),
    "glm": ("glm", SIZES | {"add_qkv_bias": True, "kv_channels": 8, "rotary_percent": 0.5, "rotary_interleaved": True}),
    "gpt2": ("gpt2", SQUARE | LAYER_NORM | TIED | {"position_embedding_type": "learned_absolute"}),
    "grok": ("grok-1", GROUPED | EXPERTS | TIED | {
        "post_norm": True, "activation_func": "gelu", "moe_router_pre_softmax": True, "attn_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 6.0}),
    "internlm": ("internlm", SQUARE | BIASED),
    "internlm2": ("internlm2", GROUPED),
    "minicpm": ("minicpm", GROUPED | TIED | {"scale_depth": 1.4}),
    "minicpm experts": ("minicpm", GROUPED | TIED | EXPERTS | {"scale_depth": 1.4}),
    "mistral": ("mistral", SIZES | {"sliding_window": 7}),
    "mixtral": ("mixtral", SIZES | EXPERTS),
    "qwen": ("qwen", SQUARE | {"add_qkv_bias": True}),
    "qwen2": ("qwen2", SIZES | {"add_qkv_bias": True}),
    "qwen2 tied": ("qwen2", SIZES | TIED | {"add_qkv_bias": True}),
    "qwen2_moe": ("qwen2_moe", SIZES | WIDE_EXPERTS | SHARED | {
        "add_qkv_bias": True, "shared_expert_gate": True, "moe_router_pre_softmax": True}),
}


def spec_of(name: str, **changes: Any) -> tuple[str, ModelSpec]:
    """Return (family, specification) of a model of the table."""
    family, values = MODELS[name]
    return family, ModelSpec(**values | changes)


def make_folder(folder: Path, family: str, spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Write a Hugging Face folder with random weights, and return its tensors."""
    table, generator = family_of(family), torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(target.shape, generator=generator).to(dtype)
               for name, target in inverse(spec, table.rules(spec)).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(table, spec) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
