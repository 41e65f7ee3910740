# SPDX-License-Identifier: Apache-2.0
"""ChatGLM3-6B and GLM-4-9B (`model_type: chatglm`) from their public description; tensors named as in the public folders.

- `query_key_value` is [all queries; all keys; all values] by rows, biased (`add_qkv_bias`); `multi_query_group_num` key groups.
- Head size is `kv_channels`. The first half of a head is rotated, adjacent channels paired; the second half passes.
- `rope_ratio` multiplies the base: 10000 * rope_ratio over a rotary size of kv_channels / 2. chatglm3-6b has no such key (1);
  glm-4-9b-chat has 500, its 1m form 10000. (Only ChatGLM2-6B-32k divided positions by it instead; it is no model here.)
- `dense_h_to_4h` is [gate; up] by rows: silu(gate) * up.
- `apply_query_key_layer_scaling` divides and multiplies the scores by the layer number: nothing is left of it in fp32.
- RMS norms before attention, before the feed-forward part and at the end; residuals are taken before the norm.

Asserted, because no public folder says otherwise: rmsnorm, post_layer_norm, multi_query_attention, original_rope, no linear bias
but that of query_key_value, apply_residual_connection_post_layernorm false, head not tied. Not covered: prefix tuning.
Released files hold the constant `transformer.rotary_pos_emb.inv_freq`: see `buffers`.

Read: zhangbo2008/chatglm3_annotated modeling_chatglm.py (chatglm3-6b); vllm-project/vllm vllm/model_executor/models/chatglm.py
(names chatglm3-6b-32k as the source of base * rope_ratio); for glm-4-9b its chat forms' configurations as logged and quoted in
public repositories, and copies of its RotaryEmbedding (base = base * self.rope_ratio).
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

CHATGLM3: dict[str, Any] = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": 131, "hidden_size": 48,
    "ffn_hidden_size": 112, "kv_channels": 20, "num_layers": 4, "num_attention_heads": 6, "multi_query_attention": True,
    "multi_query_group_num": 2, "seq_length": 64, "layernorm_epsilon": 1e-5, "rmsnorm": True, "post_layer_norm": True,
    "add_bias_linear": False, "add_qkv_bias": True, "original_rope": True, "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "fp32_residual_connection": False,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "bias_dropout_fusion": True, "tie_word_embeddings": False,
    "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0, "eos_token_id": 2, "pad_token_id": 0}
TINY: dict[str, dict[str, Any]] = {
    "chatglm3-6b": CHATGLM3,
    "chatglm3-6b-32k": CHATGLM3 | {"rope_ratio": 50},
    "glm-4-9b-chat": CHATGLM3 | {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07, "num_hidden_layers": 4}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn, size = (config[key] for key in ("padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels"))
    heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
    rows = (heads + 2 * groups) * size
    table: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{layer}."
        table |= {
            name + "input_layernorm.weight": (hidden,),
            name + "self_attention.query_key_value.weight": (rows, hidden),
            name + "self_attention.query_key_value.bias": (rows,),
            name + "self_attention.dense.weight": (hidden, heads * size),
            name + "post_attention_layernorm.weight": (hidden,),
            name + "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            name + "mlp.dense_4h_to_h.weight": (hidden, ffn)}
    return table | {
        "transformer.encoder.final_layernorm.weight": (hidden,), "transformer.output_layer.weight": (vocab, hidden)}


def buffers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The constant that released files hold in addition to the parameters; not read here."""
    return {"transformer.rotary_pos_emb.inv_freq": (config["kv_channels"] // 4,)}


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the first half of every head, adjacent channels paired."""
    rotated, passed = x.chunk(2, dim=-1)
    return torch.cat((blocks.rotate_pairs(rotated, angle), passed), dim=-1)


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    for key in ("rmsnorm", "post_layer_norm", "multi_query_attention", "original_rope", "add_qkv_bias"):
        assert config[key], key
    for key in ("add_bias_linear", "apply_residual_connection_post_layernorm", "tie_word_embeddings"):
        assert not config[key], key
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    eps = config["layernorm_epsilon"]
    angle = blocks.angles(ids.size(1), size // 2, 10000.0 * config.get("rope_ratio", 1))

    x = tensors["transformer.embedding.word_embeddings.weight"][ids]
    for layer in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "input_layernorm.weight"], eps)
        packed = normed @ tensors[name + "self_attention.query_key_value.weight"].T
        packed = packed + tensors[name + "self_attention.query_key_value.bias"]
        query, key, value = packed.split((heads * size, groups * size, groups * size), dim=-1)
        query, key = rotate(blocks.split_heads(query, heads), angle), rotate(blocks.split_heads(key, groups), angle)
        context = blocks.attend(query, key, blocks.split_heads(value, groups), size**-0.5)
        x = x + context @ tensors[name + "self_attention.dense.weight"].T
        normed = blocks.rms_norm(x, tensors[name + "post_attention_layernorm.weight"], eps)
        gate, up = tensors[name + "mlp.dense_h_to_4h.weight"].chunk(2)
        x = x + blocks.silu_gated(normed, gate, up, tensors[name + "mlp.dense_4h_to_h.weight"])
    x = blocks.rms_norm(x, tensors["transformer.encoder.final_layernorm.weight"], eps)
    return x @ tensors["transformer.output_layer.weight"].T
