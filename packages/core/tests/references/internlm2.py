# SPDX-License-Identifier: Apache-2.0
"""InternLM2 (`model_type: internlm2`) from its public description; tensors named as in the public folders.

- `attention.wqkv` goes group by group: the queries of the group, then its key, then its value, each `hidden / heads` rows.
- `feed_forward`: w1 is the gate, w3 the other factor, w2 leads back. The head is `output`, the embedding `tok_embeddings`.
- `bias` (false in every release) puts a bias on wqkv and wo alone.
- Rotary embedding in the half layout, base `rope_theta`. `rope_scaling: {type: dynamic, factor}` changes it only where the
  sequence is longer than `max_position_embeddings`: base * (factor * length / max - (factor - 1))^(size / (size - 2)) for the
  whole sequence. The published code keeps its longest table between calls; here every call starts afresh.

Not covered: `rope_scaling: {type: linear}`. The published code registers no constant that would be saved.

Read: IntMeGroup/HarmonyIQA modeling_internlm2.py; the released 7B's configuration as quoted in public repositories (bias,
rope_theta, rope_scaling).
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

blocks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blocks.py"))))

PLAIN: dict[str, Any] = {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "vocab_size": 131, "hidden_size": 48,
    "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bias": False, "rope_theta": 1000000, "rope_scaling": None,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TINY: dict[str, dict[str, Any]] = {
    "internlm2": PLAIN,
    # A test's sequence must be longer than the trained one for the scaling to matter.
    "internlm2 dynamic": PLAIN | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "internlm2 biased": PLAIN | {"bias": True}}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the public folder, in forward order."""
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    rows = hidden + 2 * config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    table: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        table |= {name + "attention_norm.weight": (hidden,), name + "attention.wqkv.weight": (rows, hidden)}
        table |= {name + "attention.wqkv.bias": (rows,)} if config["bias"] else {}
        table |= {name + "attention.wo.weight": (hidden, hidden)}
        table |= {name + "attention.wo.bias": (hidden,)} if config["bias"] else {}
        table |= {
            name + "ffn_norm.weight": (hidden,),
            name + "feed_forward.w1.weight": (ffn, hidden),
            name + "feed_forward.w3.weight": (ffn, hidden),
            name + "feed_forward.w2.weight": (hidden, ffn)}
    return table | {"model.norm.weight": (hidden,), "output.weight": (vocab, hidden)}


def rotary_base(config: dict[str, Any], length: int) -> float:
    """`rope_theta`, or what dynamic scaling makes of it for a sequence of this length."""
    scaling, size = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    if scaling is None:
        return float(config["rope_theta"])
    assert scaling["type"] == "dynamic"
    return blocks.dynamic_base(config["rope_theta"], size, length, config["max_position_embeddings"], scaling["factor"])


def logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[batch, seq] token ids -> [batch, seq, vocab]."""
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    size, queries = config["hidden_size"] // heads, heads // groups
    angle = blocks.angles(ids.size(1), size, rotary_base(config, ids.size(1)))

    def linear(x: Tensor, name: str) -> Tensor:
        product = x @ tensors[name + ".weight"].T
        return product + tensors[name + ".bias"] if config["bias"] else product

    x = tensors["model.tok_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = blocks.rms_norm(x, tensors[name + "attention_norm.weight"], eps)
        packed = linear(normed, name + "attention.wqkv").unflatten(-1, (groups, queries + 2, size))
        query = packed[..., :queries, :].flatten(2, 3)
        query, key = blocks.rotate_halves(query, angle), blocks.rotate_halves(packed[..., queries, :], angle)
        context = blocks.attend(query, key, packed[..., queries + 1, :], size**-0.5)
        x = x + linear(context, name + "attention.wo")
        normed = blocks.rms_norm(x, tensors[name + "ffn_norm.weight"], eps)
        gate, up, down = (tensors[f"{name}feed_forward.{part}.weight"] for part in ("w1", "w3", "w2"))
        x = x + blocks.silu_gated(normed, gate, up, down)
    return blocks.rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["output.weight"].T
