# SPDX-License-Identifier: Apache-2.0
"""Baichuan 7B and 13B, Baichuan2 7B and 13B, from their public description; tensors named as in the public folders.

All four say `model_type: baichuan`. What tells them apart, and what each has:
- 7B: `max_position_embeddings` is in config.json: rotary embedding (half layout, base 10000). The 13B models have only
  `model_max_length`: ALiBi instead. (vLLM asks whether hidden_size is 4096; architecture BaiChuan... is Baichuan-7B alone.)
- Baichuan2: vocabulary of 125,696: the head's rows are divided by their L2 norm, in training at every pass. Baichuan 1
  (vocabulary 64,000) has a plain head. Only the configuration class of Baichuan2 has `z_loss_weight`: it marks the tiny ones.
`self_attn.W_pack` is [query; key; value] by rows; no grouped keys, no bias anywhere.

ALiBi: Baichuan-13B adds slope * key position, Baichuan2-13B slope * (key - query position); a softmax row cannot tell. Slopes of
a head count that is no power of two: those of the next lower power p, then every other slope of 2p.

Not covered: z-loss (a term of the loss), and that the published embedding has padding_idx, so its row `pad_token_id` gets no
gradient. Baichuan-7B registers `self_attn.rotary_emb.inv_freq` as a persistent buffer: see `buffers`.

Read: baichuan-inc/Baichuan-7B models/{modeling,configuration}_baichuan.py; MrInouye/baichuan-13b-chat-batch modeling_baichuan.py
(13B, first generation); jrd77/Baichuan2-13B-Chat modeling_baichuan.py; Egber1t/Ting-Gong1.0 configuration_baichuan.py
(Baichuan2-13B); vllm-project/vllm vllm/model_executor/models/baichuan.py.
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

COMMON = {
    "model_type": "baichuan", "vocab_size": 131, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 4,
    "num_attention_heads": 6, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FIRST, SECOND = {"architectures": ["BaiChuanForCausalLM"]}, {"architectures": ["BaichuanForCausalLM"]}
TINY: dict[str, dict[str, Any]] = {
    "baichuan-7b": COMMON | FIRST | {"max_position_embeddings": 64},
    "baichuan-13b": COMMON | SECOND | {"model_max_length": 64},
    "baichuan2-7b": COMMON | SECOND | {"max_position_embeddings": 64, "model_max_length": 64, "z_loss_weight": 0},
    "baichuan2-13b": COMMON | SECOND | {"model_max_length": 64, "z_loss_weight": 0}}


def is_alibi(config: dict[str, Any]) -> bool:
    return "max_position_embeddings" not in config


def is_second(config: dict[str, Any]) -> bool:
    return config["vocab_size"] == 125696 or "z_loss_weight" in config


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        table |= {
            name + "input_layernorm.weight": (hidden,),
            name + "self_attn.W_pack.weight": (3 * hidden, hidden),
            name + "self_attn.o_proj.weight": (hidden, hidden),
            name + "post_attention_layernorm.weight": (hidden,),
            name + "mlp.gate_proj.weight": (ffn, hidden),
            name + "mlp.up_proj.weight": (ffn, hidden),
            name + "mlp.down_proj.weight": (hidden, ffn)}
    return table | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def buffers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Constants that a released file may hold in addition to the parameters (first generation, 7B); not read here."""
    if is_alibi(config) or is_second(config):
        return {}
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (half,) for layer in range(config["num_hidden_layers"])}


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), its square, its cube ...: one slope a head."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[0::2][: heads - power]


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    heads, eps, length = config["num_attention_heads"], config["rms_norm_eps"], ids.size(1)
    size = config["hidden_size"] // heads
    angle = blocks.angles(length, size, 10000.0)
    slopes, position = alibi_slopes(heads), torch.arange(length)

    def alibi(scores: Tensor, head: int) -> Tensor:
        return scores + slopes[head] * (position[None, :] - position[:, None])

    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "input_layernorm.weight"], eps)
        packed = normed @ tensors[name + "self_attn.W_pack.weight"].T
        query, key, value = (blocks.split_heads(part, heads) for part in packed.chunk(3, dim=-1))
        if not is_alibi(config):
            query, key = blocks.rotate_halves(query, angle), blocks.rotate_halves(key, angle)
        context = blocks.attend(query, key, value, size**-0.5, alibi if is_alibi(config) else None)
        x = x + context @ tensors[name + "self_attn.o_proj.weight"].T
        normed = blocks.rms_norm(x, tensors[name + "post_attention_layernorm.weight"], eps)
        gate, up, down = (tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + blocks.silu_gated(normed, gate, up, down)
    head = tensors["lm_head.weight"]
    if is_second(config):
        head = head / head.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return blocks.rms_norm(x, tensors["model.norm.weight"], eps) @ head.T
