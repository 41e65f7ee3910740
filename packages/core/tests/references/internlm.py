# SPDX-License-Identifier: Apache-2.0
"""InternLM of the first generation (`model_type: internlm`; 7B, 20B) from its public description; tensors named as published.

A Llama whose `bias` (true for 7B, false for 20B) puts a bias on the query, key, value and output projections of attention and on
no other linear. No grouped keys; head not tied. Rotary embedding in the half layout, base 10000.

Later configurations have `rotary: {type, base}`: `origin` is the plain embedding; `dynamic` changes the base only where the
sequence is longer than `max_position_embeddings`, by base * (f * length / max - (f - 1))^(size / (size - 2)), f its
`scaling_factor` (1 where missing), for the whole sequence. Without the key nothing is scaled.

Not covered: the table kept between calls. The first published code registers `self_attn.rotary_emb.inv_freq` as a saved buffer:
see `buffers`. Not verified: the config.json of the 7B release itself; `bias: true` is the default of its configuration class.

Read: Pentahill/llm-example modeling_internlm.py; InternLM/InternLM tools/transformers/configuration_internlm.py; a quoted
config.json of InternLM-20B (`bias: false`, `rotary`); mindspore-lab/mindnlp
mindnlp/transformers/models/internlm/modeling_internlm.py (`rotary`, scaling_factor).
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

BIASED: dict[str, Any] = {
    "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "vocab_size": 131, "hidden_size": 48,
    "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bias": True, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY: dict[str, dict[str, Any]] = {
    "internlm-7b": BIASED,
    # A test's sequence must be longer than the trained one for the scaling to matter.
    "internlm dynamic": BIASED | {"rotary": {"type": "dynamic", "base": 10000}, "max_position_embeddings": 16},
    "internlm unbiased": BIASED | {"bias": False, "rotary": {"type": "origin", "base": 10000}}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        table[name + "input_layernorm.weight"] = (hidden,)
        for letter in "qkvo":
            table[f"{name}self_attn.{letter}_proj.weight"] = (hidden, hidden)
            if config["bias"]:
                table[f"{name}self_attn.{letter}_proj.bias"] = (hidden,)
        table |= {
            name + "post_attention_layernorm.weight": (hidden,),
            name + "mlp.gate_proj.weight": (ffn, hidden),
            name + "mlp.up_proj.weight": (ffn, hidden),
            name + "mlp.down_proj.weight": (hidden, ffn)}
    return table | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def buffers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Constants that a released file may hold in addition to the parameters; not read here."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (half,) for layer in range(config["num_hidden_layers"])}


def rotary_base(config: dict[str, Any], length: int) -> float:
    """The base of the rotary embedding for a sequence of this length."""
    rotary = config.get("rotary") or {"type": "origin", "base": 10000}
    if rotary["type"] == "origin":
        return float(rotary["base"])
    assert rotary["type"] == "dynamic"
    size, factor = config["hidden_size"] // config["num_attention_heads"], rotary.get("scaling_factor", 1.0)
    return blocks.dynamic_base(rotary["base"], size, length, config["max_position_embeddings"], factor)


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    size = config["hidden_size"] // heads
    angle = blocks.angles(ids.size(1), size, rotary_base(config, ids.size(1)))

    def project(x: Tensor, name: str) -> Tensor:
        product = x @ tensors[name + "_proj.weight"].T
        return product + tensors[name + "_proj.bias"] if config["bias"] else product

    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "input_layernorm.weight"], eps)
        query, key, value = (blocks.split_heads(project(normed, f"{name}self_attn.{letter}"), heads) for letter in "qkv")
        query, key = blocks.rotate_halves(query, angle), blocks.rotate_halves(key, angle)
        x = x + project(blocks.attend(query, key, value, size**-0.5), name + "self_attn.o")
        normed = blocks.rms_norm(x, tensors[name + "post_attention_layernorm.weight"], eps)
        gate, up, down = (tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + blocks.silu_gated(normed, gate, up, down)
    return blocks.rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T
