# SPDX-License-Identifier: Apache-2.0
"""The names that different programs give the weights of a model chunk, and ours (weights.stage_names), in
both directions.

    megatron-core     megatron-core 0.16: norms may be fused into the following projection, experts separate
    or grouped modellink-1.0     the original's Megatron-Core: latent attention in two fused matrices, its own
    gate of shared experts megatron-legacy   legacy.py

Grouped experts are two tensors with all experts of a rank, each expert's matrix transposed: `weight1`, in
memory [expert, hidden, fc1 width], and `weight2`, [expert, fc2 width, hidden]. The dialect of a file is
detected by its names. Some names depend on the model: the original's `k_layernorm` is the norm of compressed
keys and values in latent attention, and a norm of keys elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from modellink.ckpt_convert import blocks
from modellink.ckpt_convert.megatron import legacy
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage.tensors import Stored
from modellink.ckpt_convert.storage.writing import Planned
from modellink.ckpt_convert.weights import EXPERTS
from modellink.kernels.errors import ModelLinkError

Dialect = Literal["megatron-core", "modellink-1.0"]
FUSED_NORMS = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
               "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
               "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
               "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias"}
LATENT = {"self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
          "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight"}
ORIGINAL = {"self_attention.linear_qb.weight": "self_attention.linear_q_up_proj.weight",
            "self_attention.linear_kvb.weight": "self_attention.linear_kv_up_proj.weight",
            "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight"}
"""The original's names -> ours, in every model."""
ORIGINAL_LATENT = {"self_attention.k_layernorm.weight": "self_attention.kv_layernorm.weight"}
"""The same, only in models with latent attention."""
FUSED_LATENT = "self_attention.linear_qkv.weight"
KEYS, COMPRESSED, QUERIES = (f"self_attention.linear_{name}.weight"
                             for name in ("kv_down_proj", "q_down_proj", "q_proj"))
GROUPED = {"mlp.experts.weight1": "linear_fc1.weight", "mlp.experts.weight2": "linear_fc2.weight"}


def names_of(*, latent: bool) -> dict[str, str]:
    """Return the original's names -> ours, for models with or without latent attention."""
    return ORIGINAL | ORIGINAL_LATENT if latent else ORIGINAL


def is_latent(names: Iterable[str]) -> bool:
    """Return whether these weights, in any dialect, are of a model with latent attention."""
    return any(".linear_kvb." in name or ".linear_kv_up_proj." in name for name in names)


def our_name(name: str, *, latent: bool) -> str:
    """Return our name of a weight; LoRA weights are named as in lora.py."""
    name = name.replace(".base_layer.", ".").replace(".lora_A.default.",
                                                     ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    for theirs, ours in (FUSED_NORMS | LATENT | names_of(latent=latent)).items():
        if name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    for layer in ("linear_fc1", "linear_fc2"):  # Transformer Engine's grouped experts: weight0, weight1, ...
        start, found, number = name.rpartition(f"mlp.experts.{layer}.weight")
        if found and number.isdigit():
            return f"{start}mlp.{EXPERTS}{number}.{layer}.weight"
    return name


def renamed(state: Mapping[str, Any]) -> dict[str, Stored]:
    """Return the tensors of a chunk under our names; tensors that hold several weights are not split yet."""
    flat = legacy.canonical(state) if legacy.is_legacy(state) else state
    latent = is_latent(flat)
    return {our_name(name, latent=latent): value for name, value in flat.items()
            if isinstance(value, Stored) and not name.endswith("_extra_state")}


def kind_of(state: Mapping[str, Any], spec: ModelSpec) -> str:
    """Return a description of the format of a chunk, for people."""
    if legacy.is_legacy(state):
        return "Megatron-Legacy"
    endings = {name.split(".", 3)[-1] for name in state if name.startswith("decoder.layers.")}
    latent = spec.multi_head_latent_attention
    details = []
    if endings & names_of(latent=latent).keys() or (latent and FUSED_LATENT in endings):
        details.append("modellink-1.0")
    if endings & GROUPED.keys():
        details.append("grouped experts")
    return f"Megatron-Core ({', '.join(details)})" if details else "Megatron-Core"


def split_fused(chunk: Mapping[str, Stored], spec: ModelSpec, ep: int, where: object) -> dict[str, Stored]:
    """Return a chunk with one tensor per weight: fused tensors are split into windows.

    Raises:
        ModelLinkError: a tensor does not have the size that follows from the model.
    """
    found: dict[str, Stored] = {}
    for name, stored in chunk.items():
        start, _, ending = name.partition("self_attention.") if FUSED_LATENT in name else name.partition("mlp.experts.")
        if spec.multi_head_latent_attention and name.endswith(FUSED_LATENT):
            found |= {start + own: part for own, part in _latent(stored, spec, name, where).items()}
        elif f"mlp.experts.{ending}" in GROUPED:
            found |= {start + own: part
                      for own, part in _experts(f"mlp.experts.{ending}", stored, spec, ep, name, where).items()}
        else:
            found[name] = stored
    return found


def _latent(stored: Stored, spec: ModelSpec, name: str, where: object) -> dict[str, Stored]:
    """Split queries (compressed or not) from the compressed keys and values with their rotated part."""
    last = (spec.kv_lora_rank or 0) + spec.rotary_dim
    first = stored.shape[0] - last
    if len(stored.shape) != 2 or first <= 0 or stored.transposed:
        raise ModelLinkError(f"{name} has the shape {list(stored.shape)}; {last} of its rows should be keys "
                             f"and values",
                             where=where)
    columns = stored.shape[1]
    return {COMPRESSED if spec.q_lora_rank else QUERIES: stored.window(0, (first, columns)),
            KEYS: stored.window(first * columns, (last, columns))}


def _experts(kind: str, stored: Stored, spec: ModelSpec, ep: int, name: str,
             where: object) -> dict[str, Stored]:
    count, hidden = (spec.num_experts or 0) // ep, spec.hidden_size
    numbers = stored.nbytes // stored.dtype.itemsize
    if not count or numbers % (count * hidden) or stored.transposed:
        raise ModelLinkError(f"{name} has the shape {list(stored.shape)}, which does not fit {count} experts "
                             f"with hidden size "
                             f"{hidden}", where=where,
                             fix="the configuration and the weights belong to different models")
    width = numbers // (count * hidden)
    shape = (hidden, width) if kind.endswith("weight1") else (width, hidden)
    return {f"mlp.{EXPERTS}{expert}.{GROUPED[kind]}": stored.window(expert * hidden * width, shape).flipped
            for expert in range(count)}


def named(chunk: Mapping[str, Planned], dialect: Dialect, *, grouped: bool) -> dict[str, Planned]:
    """Return a chunk under our names as a state in that dialect, with experts grouped or separate."""
    if grouped:
        chunk = _grouped(chunk)
    if dialect == "megatron-core":
        return dict(chunk)
    theirs = {ours: their for their, ours in names_of(latent=is_latent(chunk)).items()}
    found: dict[str, Planned] = {}
    for name, planned in chunk.items():
        start, ending = _split(name)
        if ending in (COMPRESSED, QUERIES):
            keys = chunk[start + KEYS]
            shape = (planned.shape[0] + keys.shape[0], planned.shape[1])
            found[start + FUSED_LATENT] = blocks.joined([planned, keys], shape)
        elif ending != KEYS:
            found[start + theirs.get(ending, ending)] = planned
    return found


def _grouped(chunk: Mapping[str, Planned]) -> dict[str, Planned]:
    experts: dict[str, list[Planned]] = {}
    found: dict[str, Planned] = {}
    for name, planned in chunk.items():
        start, inside, ending = name.partition(f"mlp.{EXPERTS}")
        if not inside:
            found[name] = planned
            continue
        kind = next((kind for kind, own in GROUPED.items() if ending.partition(".")[2] == own), None)
        if kind is None:
            raise ModelLinkError(f"grouped experts cannot hold {name}", where="--moe-grouped-gemm",
                                 fix="remove it")
        experts.setdefault(start + kind, []).append(blocks.transposed(planned))
    for name, parts in experts.items():
        rows, columns = parts[0].shape
        shape = (rows, columns * len(parts)) if name.endswith("weight1") else (rows * len(parts), columns)
        found[name] = blocks.joined(parts, shape)
    return found


def _split(name: str) -> tuple[str, str]:
    """Split the name of a weight in a layer into (`decoder.layers.N.`, rest); other names are all rest."""
    if not name.startswith("decoder.layers."):
        return "", name
    number = name.removeprefix("decoder.layers.").partition(".")[0]
    start = f"decoder.layers.{number}."
    return start, name.removeprefix(start)
