# SPDX-License-Identifier: Apache-2.0
"""Megatron-Legacy: the tensors of Megatron-Core under other names, in nested mappings.

    language_model: {embedding: {word_embeddings: {weight, norm.weight ...}, position_embeddings: {weight}},
                     encoder: {layers.0.input_norm.weight, ..., final_norm.weight}, output_layer: {weight}}
    word_embeddings_for_head: {weight}    the last stage's copy of a tied embedding, if there are several
    stages

It has no names for experts, latent attention and norms after a branch. The names of older Megatron versions
are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modellink.ckpt_convert.storage.writing import Planned
from modellink.ckpt_convert.weights import OUTPUT
from modellink.kernels.errors import ModelLinkError

ROOT, TIED_HEAD = "language_model", "word_embeddings_for_head"
ENCODERS = ("encoder", "transformer")
MODULES = {
    "input_layernorm": "input_norm", "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense", "pre_mlp_layernorm": "post_attention_norm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h",
    "final_layernorm": "final_norm"}
"""Canonical module inside the decoder or a layer -> legacy module."""
OLDER = {"attention.query_key_value": "self_attention.linear_qkv",
         "attention.dense": "self_attention.linear_proj", "post_attention_layernorm": "pre_mlp_layernorm"}
ADAPTED = re.compile(r"(?P<module>.+?)\.(?P<kind>(?:base_layer|lora_[AB])\..+)")
"""The suffixes that LoRA adds to the name of a module."""
CANONICAL = {theirs: ours for ours, theirs in MODULES.items()} | OLDER


def is_legacy(state: Mapping[str, Any]) -> bool:
    return ROOT in state


def canonical(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a legacy state under canonical names; unknown names are kept."""
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
    """Return the canonical name of an entry of the encoder."""
    layer, module, kind = _split(name)
    return f"decoder.{layer}{CANONICAL.get(module, module)}.{kind}"


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}")
    return found


def state_of(chunk: Mapping[str, Planned], *, tied: bool) -> dict[str, Any]:
    """Return the legacy state of a model chunk given under canonical names.

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
    model: dict[str, Any] = {"encoder": encoder}
    if embedding:
        model = {"embedding": embedding} | model
    if head and tied:
        return {ROOT: model, TIED_HEAD: head}
    if head:
        model["output_layer"] = head
    return {ROOT: model}


def _encoder(name: str) -> str:
    """Return the legacy name of an entry of the decoder."""
    layer, module, kind = _split(name.removeprefix("decoder."))
    if module not in MODULES:
        raise ModelLinkError(f"Megatron-Legacy has no name for {name}", where="--to megatron-legacy",
                             fix="use --to megatron-core: only it has experts, latent attention and norms after a branch")
    return f"{layer}{MODULES[module]}.{kind}"


def _split(name: str) -> tuple[str, str, str]:
    """Return "layers.N." or "", the module and the kind of tensor of a name inside the decoder."""
    layer = ""
    if name.startswith("layers."):
        number, _, name = name.removeprefix("layers.").partition(".")
        layer = f"layers.{number}."
    if adapted := ADAPTED.fullmatch(name):
        return layer, adapted["module"], adapted["kind"]
    module, _, kind = name.rpartition(".")
    return layer, module, kind


