# SPDX-License-Identifier: Apache-2.0
"""Aquila and Aquila2 (`model_type: aquila`; 7B, 34B) from their public description; tensors named as in the public folders.

A Llama in names, shapes and formulas: no bias, rotary embedding in the half layout, grouped keys where `num_key_value_heads` says
so (34B), head not tied. One thing is not Llama's: the published modeling_aquila clamps the scaled scores to [-1024, 1024] before
the mask. Within that bound the two are one model, and vLLM serves Aquila as Llama.

Not covered: `rope_scaling`. Loaders skip a saved `self_attn.rotary_emb.inv_freq`: see `buffers`.
Not verified: the modeling_aquila.py of the releases themselves, of which no stored copy was found; its attention is read from an
adaptation that names it, its keys from vLLM's former AquilaForCausalLM.

Read: intel-analytics/ipex-llm python/llm/src/ipex_llm/transformers/models/aquila.py (adapted from BAAI/AquilaChat-7B
modeling_aquila.py: the clamp); vllm-project/vllm vllm/model_executor/models/aquila.py (former) and registry (now: llama).
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

CLAMP = 1024.0
AQUILA: dict[str, Any] = {
    "model_type": "aquila", "architectures": ["AquilaModel"], "vocab_size": 131, "hidden_size": 48,
    "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY: dict[str, dict[str, Any]] = {
    "aquila-7b": AQUILA,
    "aquila2-34b": AQUILA | {
        "architectures": ["AquilaForCausalLM"], "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}}


def groups_of(config: dict[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    narrow = groups_of(config) * (hidden // config["num_attention_heads"])
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        table |= {
            name + "input_layernorm.weight": (hidden,),
            name + "self_attn.q_proj.weight": (hidden, hidden),
            name + "self_attn.k_proj.weight": (narrow, hidden),
            name + "self_attn.v_proj.weight": (narrow, hidden),
            name + "self_attn.o_proj.weight": (hidden, hidden),
            name + "post_attention_layernorm.weight": (hidden,),
            name + "mlp.gate_proj.weight": (ffn, hidden),
            name + "mlp.up_proj.weight": (ffn, hidden),
            name + "mlp.down_proj.weight": (hidden, ffn)}
    return table | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def buffers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Constants that a released file may hold in addition to the parameters; not read here."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (half,) for layer in range(config["num_hidden_layers"])}


def clamped(scores: Tensor, head: int) -> Tensor:
    return scores.clamp(-CLAMP, CLAMP)


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    heads, groups, eps = config["num_attention_heads"], groups_of(config), config["rms_norm_eps"]
    size = config["hidden_size"] // heads
    angle = blocks.angles(ids.size(1), size, config.get("rope_theta", 10000.0))

    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "input_layernorm.weight"], eps)
        query, key, value = (normed @ tensors[f"{name}self_attn.{letter}_proj.weight"].T for letter in "qkv")
        query = blocks.rotate_halves(blocks.split_heads(query, heads), angle)
        key = blocks.rotate_halves(blocks.split_heads(key, groups), angle)
        context = blocks.attend(query, key, blocks.split_heads(value, groups), size**-0.5, clamped)
        x = x + context @ tensors[name + "self_attn.o_proj.weight"].T
        normed = blocks.rms_norm(x, tensors[name + "post_attention_layernorm.weight"], eps)
        gate, up, down = (tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + blocks.silu_gated(normed, gate, up, down)
    return blocks.rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T
