# SPDX-License-Identifier: Apache-2.0
"""The two files of a peft adapter, `adapter_config.json` and `adapter_model.safetensors`: reading, and their
meaning.

Format: peft 0.7 to 0.21. A tensor is named `base_model.model.<Hugging Face module>.lora_A.weight` or
`.lora_B.weight`; A is [rank, in] and B [out, rank], never transposed (`fan_in_fan_out` tells that the
module's own weight is). `r` and `lora_alpha` hold for all modules; `rank_pattern` and `alpha_pattern`
override them by the end of a module's name.

Not here: other kinds of adapters, trained embeddings and biases, DoRA, quantized base models; such a folder
is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from math import isclose, sqrt
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.lora import A, B, is_linear
from modellink.ckpt_convert.rules import Rows
from modellink.ckpt_convert.source import refuse_left_over
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage import safetensors
from modellink.ckpt_convert.storage.tensors import Assembled, Part, Stored, as_bytes
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "lora_bias": (False,),
    "use_qalora": (False,), "modules_to_save": ([],), "target_parameters": ([],),
    "trainable_token_indices": ([], {}), "layer_replication": ([],), "alora_invocation_tokens": ([],),
    "kasa_config": (), "arrow_config": (), "use_bdlora": (), "velora_config": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
"""Keys that must be missing, null, or one of these values; other kinds of initialization change the base
weights."""


def is_peft(folder: Path) -> bool:
    """Return whether a folder is a peft adapter."""
    return (folder / CONFIG).exists()


def linear_modules(spec: ModelSpec, family: str) -> dict[str, bool]:
    """Return the Hugging Face modules that can have an adapter -> whether their weight is stored [in, out]."""
    return {piece.name.removesuffix(".weight"): piece.transposed
            for name, pieces in _linear(spec, family).items()
            for piece in pieces}


def _linear(spec: ModelSpec, family: str) -> dict[str, Rows]:
    """Return the rules of the matrices that can have an adapter."""
    known = weights(spec)
    return {name: pieces for name, pieces in family_of(family).rules(spec).items()
            if is_linear(name, known[name])}


def read(folder: Path, spec: ModelSpec, family: str) -> tuple[AdapterConfig, dict[str, Assembled]]:
    """Return (configuration, canonical name -> tensor in the file). See peft.py for how modules are combined.

    Raises:
        ModelLinkError: a file is missing or damaged, the adapter is of another kind, or it does not fit the
            model.
    """
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise ModelLinkError("the configuration is not a mapping", where=folder / CONFIG)
    config = _config(values, folder / CONFIG)
    modules: dict[str, dict[str, Stored]] = {}
    unknown = []
    for name, stored in safetensors.stored(folder / WEIGHTS).items():
        if match := NAME.fullmatch(name):
            modules.setdefault(match["module"], {})[match["side"]] = stored
        else:
            unknown.append(name)
    rules = _linear(spec, family)
    known = {piece.name.removesuffix(".weight") for pieces in rules.values() for piece in pieces}
    refuse_left_over([*unknown, *(name for name in modules if name not in known)], folder / WEIGHTS)
    for name, sides in modules.items():
        _check(name, sides, values, config, folder)
    tensors: dict[str, Assembled] = {}
    known_weights = weights(spec)
    for canonical, pieces in rules.items():
        if _fitting(pieces, known_weights[canonical].shape[1], modules, folder):
            tensors |= _joined(canonical.removesuffix(".weight"), pieces, modules)
    if not tensors:
        raise ModelLinkError("it has no adapter of this model", where=folder / WEIGHTS)
    return config, tensors


def _fitting(pieces: Rows, width: int, modules: Mapping[str, Mapping[str, Stored]], folder: Path) -> bool:
    """Return whether a weight has an adapter, whose size must fit the weight."""
    heights: Counter[str] = Counter()
    for name, rows, _ in pieces:
        heights[name.removesuffix(".weight")] += len(rows)
    for name in heights.keys() & modules.keys():
        first, second = (modules[name][side].shape for side in "AB")
        if (second[0], first[1]) != (heights[name], width):
            raise ModelLinkError(f"{name} has lora_A {list(first)} and lora_B {list(second)}; its weight has "
                                 f"the shape "
                                 f"[{heights[name]}, {width}]", where=folder / WEIGHTS,
                                 fix="the adapter belongs to another model")
    return bool(heights.keys() & modules.keys())


def _check(name: str, sides: Mapping[str, Stored], values: Mapping[str, Any], config: AdapterConfig,
           folder: Path) -> None:
    """Check that a module has both matrices, with the rank of the configuration and the scale of all other
    modules."""
    if len(sides) != 2 or any(len(stored.shape) != 2 for stored in sides.values()):
        raise ModelLinkError(f"{name} does not have the two matrices lora_A and lora_B",
                             where=folder / WEIGHTS,
                             fix="the adapter is incomplete, or of a layer that is not linear")
    rank = _of(name, values.get("rank_pattern"), config.r, folder / CONFIG)
    alpha = _of(name, values.get("alpha_pattern"), config.alpha, folder / CONFIG)
    if not sides["A"].shape[0] == sides["B"].shape[1] == rank:
        raise ModelLinkError(f"{name} has lora_A {list(sides['A'].shape)} and lora_B "
                             f"{list(sides['B'].shape)}; by the "
                             f"configuration the rank is {rank}", where=folder / WEIGHTS)
    scale = AdapterConfig(int(rank), alpha, rslora=config.rslora).scale
    if not isclose(scale, config.scale, rel_tol=1e-6):
        raise ModelLinkError(f"{name} is scaled by {scale:g} and the adapter by {config.scale:g}; only one "
                             f"scale is supported",
                             where=folder / CONFIG, fix="merge it with peft")


def _of(name: str, pattern: Mapping[str, float] | None, usual: float, where: Path) -> float:
    """Return the value of the first pattern entry that the module's name ends with, as in peft, or `usual`."""
    for key, value in (pattern or {}).items():
        plain = key.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", plain):
            raise ModelLinkError(f"{key!r} is a regular expression; only names of modules and their endings "
                                 f"are supported",
                                 where=where)
        if name == plain or (plain == key and name.endswith("." + key)):
            return value
    return usual


def _joined(module: str, pieces: Rows, modules: Mapping[str, Mapping[str, Stored]]) -> dict[str, Assembled]:
    """Return A and B of a canonical matrix; equal As are stored once, different ones stacked."""
    places: dict[bytes, tuple[int, Stored]] = {}
    columns: dict[str, range] = {}
    rank = 0
    for name in dict.fromkeys(piece.name.removesuffix(".weight") for piece in pieces):
        if name not in modules:
            continue
        stored = modules[name]["A"]
        content = bytes(as_bytes(stored.read(range(stored.shape[0]), range(stored.columns))))
        if content not in places:
            places[content] = rank, stored
            rank += stored.shape[0]
        start = places[content][0]
        columns[name] = range(start, start + stored.shape[0])
    first = tuple(Part(stored, range(stored.shape[0]), range(stored.columns), (start, 0))
                  for start, stored in places.values())
    second, row = [], 0
    for name, rows, _ in pieces:
        if own := columns.get(name.removesuffix(".weight")):
            stored = modules[name.removesuffix(".weight")]["B"]
            second.append(Part(stored, rows, range(len(own)), (row, own.start)))
        row += len(rows)
    width = first[0].stored.columns
    return {module + A: Assembled(module + A, (rank, width), first),
            module + B: Assembled(module + B, (row, rank), tuple(second), sparse=True)}


def _config(values: Mapping[str, Any], where: Path) -> AdapterConfig:
    for key, allowed in ONLY.items():
        value = values.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in allowed):
            raise ModelLinkError(f"{key} is {value!r}, which is not supported", where=where,
                                 fix="merge it with peft")
    r, alpha, dropout = (values.get(key, 0) for key in ("r", "lora_alpha", "lora_dropout"))
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or type(dropout) not in (int, float):
        raise ModelLinkError(f"r is {r!r}, lora_alpha is {alpha!r} and lora_dropout is {dropout!r}",
                             where=where, fix="they must be numbers, and r at least 1")
    return AdapterConfig(r, alpha, dropout, values.get("use_rslora") is True)


def config_of(config: AdapterConfig, ranks: Mapping[str, int], model: Mapping[str, bool],
              base: str | None) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        ranks: module -> its rank, for all of the adapter.
        model: `linear_modules`.
    """
    others = {name: rank for name, rank in ranks.items() if rank != config.r}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "inference_mode": True, "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
            "use_rslora": config.rslora, "target_modules": _targets(ranks, model), "bias": "none",
            "modules_to_save": None, "init_lora_weights": True,
            "fan_in_fan_out": any(model[name] for name in ranks), "rank_pattern": others,
            "alpha_pattern": {name: config.scale * (sqrt(rank) if config.rslora else rank)
                              for name, rank in others.items()}}


def _targets(names: Collection[str], model: Collection[str]) -> list[str]:
    """Return endings of names that match exactly these modules of the model; full names if an ending matches
    others too."""
    complete: dict[str, bool] = {}
    for name in model:
        kind = name.rpartition(".")[2]
        complete[kind] = complete.get(kind, True) and name in names
    found = set()
    for name in names:
        kind = name.rpartition(".")[2]
        found.add(kind if complete[kind] else name)
    return sorted(found)
