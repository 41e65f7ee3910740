# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-2B and MiniCPM-MoE-8x2B (`model_type: minicpm`) from their public description; tensors named as published.

A Llama with three scales and a tied head (`tie_word_embeddings` defaults to true):
- embeddings times `scale_emb`;
- what attention and the feed-forward part add to the residual, times `scale_depth` / sqrt(num_hidden_layers);
- the last hidden state divided by `hidden_size` / `dim_model_base` before the head.
Rotary embedding in the half layout, base `rope_theta` (10000 where the key is missing); grouped keys; no bias.

With `num_experts` above 0 the feed-forward part of every layer is a mixture: router `mlp.gate`, experts `mlp.experts.{e}` of w1
(gate), w3, w2 (leads back). Softmax over all experts, the `num_experts_per_tok` largest, divided by their sum.

Not covered: the load-balancing loss, `rope_scaling`, MiniCPM3. Not verified: the architecture and model type that the mixture's
public config.json names (the NeuronX port calls it MiniCPMMoEForCausalLM, vLLM reads it as MiniCPMForCausalLM).

Read: vllm-project/vllm vllm/model_executor/models/minicpm.py; mlc-ai/mlc-llm python/mlc_llm/model/minicpm/minicpm_model.py;
aws-neuron/neuronx-distributed-inference contrib/models/minicpm-moe-8x2b/src/modeling_minicpm_moe_neuronx.py (tensor names of the
mixture); wxthu/nas_tuner modeling_minicpm.py (attention and feed-forward part of a later MiniCPM).
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

DENSE: dict[str, Any] = {
    "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "vocab_size": 131, "hidden_size": 48,
    "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "attention_bias": False,
    "scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2}
TINY: dict[str, dict[str, Any]] = {
    "minicpm-2b": DENSE,
    "minicpm untied": DENSE | {"tie_word_embeddings": False, "rope_theta": 5000.0},
    "minicpm-moe-8x2b": DENSE | {"num_experts": 10, "num_experts_per_tok": 2}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    narrow = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        table |= {
            name + "input_layernorm.weight": (hidden,),
            name + "self_attn.q_proj.weight": (hidden, hidden),
            name + "self_attn.k_proj.weight": (narrow, hidden),
            name + "self_attn.v_proj.weight": (narrow, hidden),
            name + "self_attn.o_proj.weight": (hidden, hidden),
            name + "post_attention_layernorm.weight": (hidden,)}
        if config.get("num_experts", 0):
            table[name + "mlp.gate.weight"] = (config["num_experts"], hidden)
            for e in range(config["num_experts"]):
                table |= {f"{name}mlp.experts.{e}.{part}.weight": (ffn, hidden) for part in ("w1", "w3")}
                table[f"{name}mlp.experts.{e}.w2.weight"] = (hidden, ffn)
        else:
            table |= {f"{name}mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
            table[name + "mlp.down_proj.weight"] = (hidden, ffn)
    tied = config.get("tie_word_embeddings", True)
    return table | {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocab, hidden)})


def feed_forward(config: dict[str, Any], tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The gated feed-forward part, or the mixture of them, of the layer whose tensors begin with `name`."""
    if not config.get("num_experts", 0):
        gate, up, down = (tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return blocks.silu_gated(x, gate, up, down)

    def expert(e: int, x: Tensor) -> Tensor:
        gate, up, down = (tensors[f"{name}mlp.experts.{e}.{part}.weight"] for part in ("w1", "w3", "w2"))
        return blocks.silu_gated(x, gate, up, down)

    probabilities = (x @ tensors[name + "mlp.gate.weight"].T).softmax(-1)
    weights, chosen = probabilities.topk(config["num_experts_per_tok"], dim=-1)
    return blocks.mixture(x, weights / weights.sum(-1, keepdim=True), chosen, expert, config["num_experts"])


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    assert config.get("rope_scaling") is None and not config.get("attention_bias", False)
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    size = config["hidden_size"] // heads
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    angle = blocks.angles(ids.size(1), size, config.get("rope_theta", 10000.0))

    x = tensors["model.embed_tokens.weight"][ids] * config["scale_emb"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "input_layernorm.weight"], eps)
        query, key, value = (normed @ tensors[f"{name}self_attn.{letter}_proj.weight"].T for letter in "qkv")
        query = blocks.rotate_halves(blocks.split_heads(query, heads), angle)
        key = blocks.rotate_halves(blocks.split_heads(key, groups), angle)
        context = blocks.attend(query, key, blocks.split_heads(value, groups), size**-0.5)
        x = x + depth * (context @ tensors[name + "self_attn.o_proj.weight"].T)
        normed = blocks.rms_norm(x, tensors[name + "post_attention_layernorm.weight"], eps)
        x = x + depth * feed_forward(config, tensors, name, normed)
    x = blocks.rms_norm(x, tensors["model.norm.weight"], eps) / (config["hidden_size"] / config["dim_model_base"])
    tied = config.get("tie_word_embeddings", True)
    return x @ tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].T
