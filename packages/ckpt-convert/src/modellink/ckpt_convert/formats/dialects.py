"""The names that different programs give the weights of one model chunk, and ours (weights.stage_names), both ways.

    megatron-core     megatron-core 0.16: norms may be fused into the projection behind them, experts one by one or grouped
    modellink-1.0     the original's Megatron-Core: latent attention in two fused matrices, a gate of its own for shared experts
    megatron-legacy   legacy.py

Grouped experts are two tensors that hold all experts of a rank, each expert's matrix transposed: `weight1`, in memory [expert,
hidden, width of fc1], and `weight2`, [expert, width of fc2, hidden]. Which dialect a file is in is found by its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from modellink.ckpt_convert import blocks
from modellink.ckpt_convert.formats import legacy
from modellink.ckpt_convert.formats.tensors import Stored
from modellink.ckpt_convert.formats.writing import Planned
from modellink.ckpt_convert.spec import ModelSpec
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
            "self_attention.k_layernorm.weight": "self_attention.kv_layernorm.weight",
            "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight"}
"""The original's names -> ours."""
FUSED_LATENT = "self_attention.linear_qkv.weight"
KEYS, COMPRESSED, QUERIES = (f"self_attention.linear_{name}.weight" for name in ("kv_down_proj", "q_down_proj", "q_proj"))
GROUPED = {"mlp.experts.weight1": "linear_fc1.weight", "mlp.experts.weight2": "linear_fc2.weight"}


def our_name(name: str) -> str:
    """A weight's name, called as it is here; those of LoRA as lora.py says."""
    name = name.replace(".base_layer.", ".").replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    for theirs, ours in (FUSED_NORMS | LATENT | ORIGINAL).items():
        if name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    for layer in ("linear_fc1", "linear_fc2"):  # Transformer Engine's grouped experts: one tensor each, weight0, weight1 ...
        start, found, number = name.rpartition(f"mlp.experts.{layer}.weight")
        if found and number.isdigit():
            return f"{start}mlp.{EXPERTS}{number}.{layer}.weight"
    return name


def renamed(state: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of a chunk under our names, those that hold several weights still whole."""
    flat = legacy.canonical(state) if legacy.is_legacy(state) else state
    return {our_name(name): value for name, value in flat.items()
            if isinstance(value, Stored) and not name.endswith("_extra_state")}


def kind_of(state: Mapping[str, Any], spec: ModelSpec) -> str:
    """For people: what wrote a chunk."""
    if legacy.is_legacy(state):
        return "Megatron-Legacy"
    endings = {name.split(".", 3)[-1] for name in state if name.startswith("decoder.layers.")}
    original = endings & ORIGINAL.keys() or (spec.multi_head_latent_attention and FUSED_LATENT in endings)
    told = ["modellink-1.0"] * bool(original) + ["grouped experts"] * bool(endings & GROUPED.keys())
    return "Megatron-Core" + (f" ({', '.join(told)})" if told else "")


def taken_apart(chunk: Mapping[str, Stored], spec: ModelSpec, ep: int, where: object) -> dict[str, Stored]:
    """A chunk with one tensor a weight, as windows of those that hold several.

    Raises:
        ModelLinkError: a tensor does not have the size that the model gives it.
    """
    found: dict[str, Stored] = {}
    for name, stored in chunk.items():
        start, _, ending = name.partition("self_attention.") if FUSED_LATENT in name else name.partition("mlp.experts.")
        if spec.multi_head_latent_attention and name.endswith(FUSED_LATENT):
            found |= {start + own: part for own, part in _latent(stored, spec, name, where).items()}
        elif f"mlp.experts.{ending}" in GROUPED:
            found |= {start + own: part for own, part in _experts(f"mlp.experts.{ending}", stored, spec, ep, name, where).items()}
        else:
            found[name] = stored
    return found


def _latent(stored: Stored, spec: ModelSpec, name: str, where: object) -> dict[str, Stored]:
    """Queries (compressed or not), then the compressed keys and values with the rotated part."""
    last = (spec.kv_lora_rank or 0) + spec.rotary_dim
    first = stored.shape[0] - last
    if len(stored.shape) != 2 or first <= 0 or stored.transposed:
        raise ModelLinkError(f"{name} has the shape {list(stored.shape)}; {last} of its rows are keys and values", where=where)
    columns = stored.shape[1]
    return {COMPRESSED if spec.q_lora_rank else QUERIES: stored.window(0, (first, columns)),
            KEYS: stored.window(first * columns, (last, columns))}


def _experts(kind: str, stored: Stored, spec: ModelSpec, ep: int, name: str, where: object) -> dict[str, Stored]:
    count, hidden = (spec.num_experts or 0) // ep, spec.hidden_size
    numbers = stored.nbytes // stored.dtype.itemsize
    if not count or numbers % (count * hidden) or stored.transposed:
        raise ModelLinkError(f"{name} has the shape {list(stored.shape)}, which is not {count} experts of the width {hidden}",
                             where=where, fix="the configuration and the weights belong to different models")
    width = numbers // (count * hidden)
    shape = (hidden, width) if kind.endswith("weight1") else (width, hidden)
    return {f"mlp.{EXPERTS}{expert}.{GROUPED[kind]}": stored.window(expert * hidden * width, shape).flipped
            for expert in range(count)}


def named(chunk: Mapping[str, Planned], dialect: Dialect, *, grouped: bool) -> dict[str, Planned]:
    """A chunk under our names as a state of that dialect, experts grouped or one by one."""
    if grouped:
        chunk = _grouped(chunk)
    if dialect == "megatron-core":
        return dict(chunk)
    theirs = {ours: their for their, ours in ORIGINAL.items()}
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
            raise ModelLinkError(f"grouped experts have no place for {name}", where="--moe-grouped-gemm", fix="leave it out")
        experts.setdefault(start + kind, []).append(blocks.transposed(planned))
    for name, parts in experts.items():
        rows, columns = parts[0].shape
        shape = (rows, columns * len(parts)) if name.endswith("weight1") else (rows * len(parts), columns)
        found[name] = blocks.joined(parts, shape)
    return found


def _split(name: str) -> tuple[str, str]:
    """(`decoder.layers.N.`, the rest) of a weight of a layer; everything is rest in others."""
    if not name.startswith("decoder.layers."):
        return "", name
    number = name.removeprefix("decoder.layers.").partition(".")[0]
    start = f"decoder.layers.{number}."
    return start, name.removeprefix(start)
