# SPDX-License-Identifier: Apache-2.0
"""Random models and documents for the rows, written without transformers. Functions that begin with `write`
run on a rank."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 120, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 24, "intermediate_size": 336, "vocab_size": 251, "max_position_embeddings": 256}
"""No two sizes are equal or in the usual ratio. The activations of a layer exceed the 64 KiB below which
nothing is swapped."""
SMALL: dict[str, Any] = {
    "num_hidden_layers": 12, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 2816, "vocab_size": 32000, "max_position_embeddings": 2048}
"""About 200 million parameters, for the rows about speed."""


def shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Hugging Face Llama."""
    hidden, ffn, dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, groups = sizes["num_attention_heads"] * dim, sizes["num_key_value_heads"] * dim
    vocabulary = sizes["vocab_size"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        of_layer = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (groups, hidden),
            "self_attn.v_proj": (groups, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return found


def parameters(sizes: dict[str, Any]) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for shape in shapes(sizes).values())


def write_llama(folder: str, sizes: dict[str, Any], dtype: str) -> None:
    """On a rank: write a Hugging Face folder with random weights and norms, the same on every machine."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in shapes(sizes).items():
        noise = torch.randn(shape, generator=generator)
        value = 1 + 0.2 * noise if len(shape) == 1 else noise * 1.3 / shape[-1] ** 0.5
        tensors[name] = value.to(getattr(torch, dtype)).contiguous()
    path = Path(folder)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = sizes | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))


def write_documents(prefix: str, vocabulary: int, documents: int, length: int) -> None:
    """On a rank: write a data set in which every token depends on the previous one."""
    import numpy as np

    from modellink.data_prep.indexed import IndexedWriter, token_dtype

    generator = np.random.default_rng(3)
    with IndexedWriter(prefix, token_dtype(vocabulary), durable=False) as writer:
        for _ in range(documents):
            steps = generator.integers(0, 3, size=generator.integers(length // 2, length))
            writer.add_document((generator.integers(0, vocabulary) + 5 * steps.cumsum()) % vocabulary)
