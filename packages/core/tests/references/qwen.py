# SPDX-License-Identifier: Apache-2.0
"""Qwen of the first generation (`model_type: qwen`; 7B, 14B, 72B) from its public description; tensors named as published.

- `attn.c_attn` is [query; key; value] by rows, always biased, no grouped keys. `no_bias` (true in every release) takes the bias
  from all other linears; kv_channels * heads equals the hidden size.
- The feed-forward width is `intermediate_size` / 2: c_proj(w1 x * silu(w2 x)), so w2 is the gate.
- Rotary embedding in the half layout on the whole head, base `rotary_emb_base`. Norm eps is `layer_norm_epsilon`.
- `use_dynamic_ntk` and `use_logn_attn` do nothing while training. In evaluation, with n tokens and s = `seq_length`:
  NTK: the base becomes base * a^(size / (size - 2)), a = max(1, 2^ceil(log2(n / s) + 1) - 1), so only n > s is changed;
  log n: when n > s, the query at position p (from 1) is multiplied by log(p) / log(s) where p > s.
  `logits(..., training=False)` gives that form, for one unpadded sequence length.

Not covered: dropout, and NTK per row of a padded batch. The published code registers no constant that would be saved.

Read: zhangningboo/Qwen-7B modeling_qwen.py and config.json; mapengAdam/qianwen-72B config.json.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

COMMON: dict[str, Any] = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 131, "hidden_size": 48, "intermediate_size": 224,
    "num_hidden_layers": 4, "num_attention_heads": 6, "kv_channels": 8, "no_bias": True, "rotary_pct": 1.0,
    "scale_attn_weights": True, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "max_position_embeddings": 64,
    "tie_word_embeddings": False}
TINY: dict[str, dict[str, Any]] = {
    # Trained on 16 tokens, so that a test's sequence is longer and the two switches would be seen if they acted in training.
    "qwen-7b": COMMON | {
        "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6, "seq_length": 16, "use_dynamic_ntk": True, "use_logn_attn": True},
    "qwen-72b": COMMON | {
        "rotary_emb_base": 1000000, "rope_theta": 1000000, "layer_norm_epsilon": 1e-5, "seq_length": 32,
        "use_dynamic_ntk": False, "use_logn_attn": False}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"] // 2
    table: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}."
        table |= {
            name + "ln_1.weight": (hidden,),
            name + "attn.c_attn.weight": (3 * hidden, hidden),
            name + "attn.c_attn.bias": (3 * hidden,),
            name + "attn.c_proj.weight": (hidden, hidden),
            name + "ln_2.weight": (hidden,),
            name + "mlp.w1.weight": (ffn, hidden),
            name + "mlp.w2.weight": (ffn, hidden),
            name + "mlp.c_proj.weight": (hidden, ffn)}
    return table | {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def rotary_base(config: dict[str, Any], length: int, training: bool) -> float:
    """`rotary_emb_base`, enlarged in evaluation beyond `seq_length`."""
    size = config["kv_channels"]
    if training or not config["use_dynamic_ntk"]:
        return float(config["rotary_emb_base"])
    alpha = max(1, 2 ** math.ceil(math.log2(length / config["seq_length"]) + 1) - 1)
    return float(config["rotary_emb_base"] * alpha ** (size / (size - 2)))


def query_scale(config: dict[str, Any], length: int, training: bool) -> Tensor:
    """[length]: 1, or in evaluation beyond `seq_length` the log-n factor of each position."""
    trained = config["seq_length"]
    if training or not config["use_logn_attn"] or length <= trained:
        return torch.ones(length)
    return torch.tensor([math.log(p, trained) if p > trained else 1.0 for p in range(1, length + 1)])


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor, training: bool = True) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    assert config["no_bias"] and config["rotary_pct"] == 1.0
    heads, size, eps, length = config["num_attention_heads"], config["kv_channels"], config["layer_norm_epsilon"], ids.size(1)
    assert heads * size == config["hidden_size"]
    angle = blocks.angles(length, size, rotary_base(config, length, training))
    factor = query_scale(config, length, training)[:, None, None]

    x = tensors["transformer.wte.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "ln_1.weight"], eps)
        packed = normed @ tensors[name + "attn.c_attn.weight"].T + tensors[name + "attn.c_attn.bias"]
        query, key, value = (blocks.split_heads(part, heads) for part in packed.chunk(3, dim=-1))
        query, key = blocks.rotate_halves(query, angle) * factor, blocks.rotate_halves(key, angle)
        x = x + blocks.attend(query, key, value, size**-0.5) @ tensors[name + "attn.c_proj.weight"].T
        normed = blocks.rms_norm(x, tensors[name + "ln_2.weight"], eps)
        up, gate, down = (tensors[f"{name}mlp.{part}.weight"] for part in ("w1", "w2", "c_proj"))
        x = x + blocks.silu_gated(normed, gate, up, down)
    return blocks.rms_norm(x, tensors["transformer.ln_f.weight"], eps) @ tensors["lm_head.weight"].T
