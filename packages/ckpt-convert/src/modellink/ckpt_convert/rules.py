# SPDX-License-Identifier: Apache-2.0
"""How a canonical weight is made of Hugging Face weights, as row maps, and the inverse computed from the same
map.

A rule lists, in the order of the canonical rows, the rows of the Hugging Face tensors they come from; columns
are never changed. The inverse gives the canonical rows of a Hugging Face tensor. It is computed, so that both
directions cannot disagree, and must be complete: a row that no rule maps is a bug in the family.

A family has a table: canonical module -> one of `same`, `stack`, `grouped`, `packed` with its own module
names. Not
here: the tables (families/) and reading (formats/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import IN_LAYER, Weight, weights
from modellink.kernels.errors import InternalError, ModelLinkError
from modellink.kernels.parallel import query_key_value_rows


class HFRows(NamedTuple):
    """Rows of a Hugging Face tensor, or of its transpose if it is stored [in, out]."""

    name: str
    rows: range
    transposed: bool = False


Rows = list[HFRows]
Rules = dict[str, Rows]
"""Canonical name -> the Hugging Face rows it is made of."""
Maker = Callable[[ModelSpec, Weight, Callable[[str], str]], Rows]
"""(model, canonical weight, module -> full tensor name) -> the Hugging Face rows it is made of."""


def same(module: str, *, transposed: bool = False, kind: str | None = None) -> Maker:
    """Map to the same rows under another name; `kind` if the tensor is not called `weight` or `bias`, e.g.
    `scale`."""
    if kind is None:
        return stack(module, transposed=transposed)

    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        return [HFRows(f"{name(module).rpartition('.')[0]}.{kind}", range(weight.shape[0]))]
    return make


def stack(*modules: str, transposed: bool = False) -> Maker:
    """Map to equal shares of rows, one tensor after the other, e.g. gate then up."""
    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        share = range(weight.shape[0] // len(modules))
        return [HFRows(name(module), share, transposed and len(weight.shape) > 1) for module in modules]
    return make


def grouped(query: str, key: str, value: str) -> Maker:
    """Map Megatron's fused QKV matrix, group by group, to three projections."""
    modules = {"q": query, "k": key, "v": value}

    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        rows = query_key_value_rows(spec.num_attention_heads, spec.groups, spec.head_dim)
        return [HFRows(name(modules[kind]), piece) for kind, piece in rows]
    return make


def packed(module: str, *, transposed: bool = False) -> Maker:
    """Map Megatron's fused QKV matrix to one tensor with all queries, then all keys, then all values."""
    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.groups * spec.head_dim
        start = {"q": 0, "k": queries, "v": queries + keys}
        return [HFRows(name(module), range(start[kind] + rows.start, start[kind] + rows.stop),
                      transposed and len(weight.shape) > 1)
                for kind, rows in query_key_value_rows(spec.num_attention_heads, spec.groups, spec.head_dim)]
    return make


def rules_of(spec: ModelSpec, names: Mapping[str, Maker], layer: str, family: str) -> Rules:
    """Return the rules of a model from a family's table.

    Args:
        names: canonical module without numbers, e.g. `mlp.experts.linear_fc1` -> its maker; a full canonical
            name stands for a weight that Hugging Face calls `weight` and we do not.
        layer: prefix of the Hugging Face names in a layer; `{layer}` in it and `{expert}` in module names are
            replaced.
        family: for the error.

    Raises:
        ModelLinkError: the family has no name for a weight of this model.
    """
    rules = {}
    for canonical, weight in weights(spec).items():
        found = IN_LAYER.match(canonical)
        key, number, expert = canonical, "", ""
        if found is not None:
            key, number, expert = found["rest"], found["layer"], found["expert"] or ""
        if expert:
            key = f"mlp.experts{key}"
        module, _, kind = key.rpartition(".")
        if key in names:
            module, kind = key, "weight"
        if module not in names:
            raise ModelLinkError(f"the family {family} has no tensor for {canonical}",
                                 where="--model-type-hf",
                                 fix="the model has a feature that this family does not support")

        def full(theirs: str, kind: str = kind, start: str = layer if found else "",
                 numbers: tuple[str, str] = (number, expert),
                 ) -> str:
            return f"{start}{theirs}.{kind}".replace("{layer}", numbers[0]).replace("{expert}", numbers[1])
        rules[canonical] = names[module](spec, weight, full)
    return rules


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor as rows of canonical tensors; `transposed` if it is stored [in, out]."""

    shape: tuple[int, ...]
    rows: list[tuple[str, range]]
    transposed: bool = False


def inverse(spec: ModelSpec, rules: Mapping[str, Rows]) -> dict[str, HFTensor]:
    """Return Hugging Face name -> the canonical rows it is made of, in the order of the forward pass.

    Raises:
        InternalError: a weight of the model or a row is not mapped, or a row is mapped twice.
    """
    known = weights(spec)
    if rules.keys() != known.keys():
        raise InternalError(f"the rules and the model differ in {sorted(rules.keys() ^ known.keys())[:5]}")
    found: dict[str, list[tuple[range, str, range, bool]]] = {}
    for canonical, weight in known.items():
        row = 0
        for name, piece, transposed in rules[canonical]:
            found.setdefault(name, []).append((piece, canonical, range(row, row + len(piece)), transposed))
            row += len(piece)
        if row != weight.shape[0]:
            raise InternalError(f"the rule of {canonical} has {row} rows, the weight has {weight.shape[0]}")
    targets = {}
    for name, pieces in found.items():
        pieces.sort(key=lambda entry: entry[0].start)
        row = 0
        for piece, canonical, _, _ in pieces:
            if piece.start != row:
                how = "twice" if piece.start < row else "never"
                raise InternalError(f"row {min(row, piece.start)} of {name} is mapped {how}", where=canonical)
            row = piece.stop
        shape, transposed = (row, *known[pieces[0][1]].shape[1:]), pieces[0][3]
        targets[name] = HFTensor(shape[::-1] if transposed else shape,
                               [(canonical, rows) for _, canonical, rows, _ in pieces], transposed)
    return targets
