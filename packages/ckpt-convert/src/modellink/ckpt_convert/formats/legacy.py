"""Megatron-Legacy: the same tensors as Megatron-Core's under other names, in nested mappings.

    language_model: {embedding: {word_embeddings: {weight, norm.weight ...}, position_embeddings: {weight}},
                     encoder: {layers.0.input_norm.weight, ..., final_norm.weight}, output_layer: {weight}}
    word_embeddings_for_head: {weight}    the last stage's copy of a tied embedding, where there are several stages

It has no names for experts, latent attention and norms behind a branch. Read are also the names of older Megatron versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modellink.ckpt_convert.formats.writing import Planned
from modellink.ckpt_convert.weights import OUTPUT
from modellink.kernels.errors import ModelLinkError

ROOT, TIED_HEAD = "language_model", "word_embeddings_for_head"
ENCODERS = ("encoder", "transformer")
MODULES = {
    "input_layernorm": "input_norm", "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense", "pre_mlp_layernorm": "post_attention_norm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h", "final_layernorm": "final_norm"}
"""Canonical module inside the decoder or a layer -> legacy module."""
OLDER = {"attention.query_key_value": "self_attention.linear_qkv", "attention.dense": "self_attention.linear_proj",
         "post_attention_layernorm": "pre_mlp_layernorm"}
ADAPTED = re.compile(r"(?P<module>.+?)\.(?P<kind>(?:base_layer|lora_[AB])\..+)")
"""What LoRA puts behind the name of a module."""
CANONICAL = {theirs: ours for ours, theirs in MODULES.items()} | OLDER


def is_legacy(state: Mapping[str, Any]) -> bool:
    return ROOT in state


def canonical(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a legacy state under canonical names; those of no known name keep their own."""
    model = state[ROOT]
    found: dict[str, Any] = {}
    for group, inner in model.items():
        if group in ENCODERS:
            found |= {_decoder(name): value for name, value in inner.items()}
        else:
            found |= _flat(inner, group)
    head = _flat(state.get(TIED_HEAD, {}), OUTPUT.rpartition(".")[0])
    return found | head


def _decoder(name: str) -> str:
    """The canonical name of an entry of the encoder."""
    start, rest = "decoder.", name
    if name.startswith("layers."):
        number, _, rest = name.removeprefix("layers.").partition(".")
        start = f"decoder.layers.{number}."
    module, _, kind = rest.rpartition(".")
    if adapted := ADAPTED.fullmatch(rest):
        module, kind = adapted["module"], adapted["kind"]
    return f"{start}{CANONICAL.get(module, module)}.{kind}"


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}")
    return found


def state_of(chunk: Mapping[str, Planned], *, tied: bool) -> dict[str, Any]:
    """The legacy state of a model chunk under canonical names.

    Raises:
        ModelLinkError: a weight has no name in Megatron-Legacy.
    """
    embedding: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    head: dict[str, Any] = {}
    for name, planned in chunk.items():
        if name.startswith("embedding."):
            _, module, kind = name.split(".", 2)
            embedding.setdefault(module, {})[kind] = planned
        elif name == OUTPUT:
            head = {"weight": planned}
        else:
            encoder[_encoder(name)] = planned
    model = ({"embedding": embedding} if embedding else {}) | {"encoder": encoder}
    if head and tied:
        return {ROOT: model, TIED_HEAD: head}
    return {ROOT: model | ({"output_layer": head} if head else {})}


def _encoder(name: str) -> str:
    rest = name.removeprefix("decoder.")
    start = ""
    if rest.startswith("layers."):
        number, _, rest = rest.removeprefix("layers.").partition(".")
        start = f"layers.{number}."
    module, _, kind = rest.rpartition(".")
    if adapted := ADAPTED.fullmatch(rest):
        module, kind = adapted["module"], adapted["kind"]
    if module not in MODULES:
        raise ModelLinkError(f"Megatron-Legacy has no name for {name}", where="--to megatron-legacy",
                             fix="use --to megatron-core; experts, latent attention and norms behind a branch exist only there")
    return f"{start}{MODULES[module]}.{kind}"


