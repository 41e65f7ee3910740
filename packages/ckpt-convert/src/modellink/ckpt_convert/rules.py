"""How a canonical weight is made of Hugging Face weights, as row maps, and the inverse from the same map.

A rule lists, in the order of the canonical rows, which rows of which Hugging Face tensor they are; columns are never touched.
The inverse answers which rows of which canonical tensors make up a Hugging Face tensor; it is computed, so both directions
cannot disagree, and it must be total: a row nobody maps is a fault of the family.

A family gives a table: canonical module -> one of `same`, `stack`, `grouped`, `packed` with its own module names. Not here: the
tables (families/) and reading (formats/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import IN_LAYER, Weight, weights
from modellink.kernels.errors import InternalError, ModelLinkError
from modellink.kernels.parallel import query_key_value_rows


class Piece(NamedTuple):
    """Rows of a Hugging Face tensor; of its transpose where that is stored [in, out]."""

    name: str
    rows: range
    transposed: bool = False


Rows = list[Piece]
Rules = dict[str, Rows]
"""Canonical name -> the Hugging Face rows it is made of."""
Maker = Callable[[ModelSpec, Weight, Callable[[str], str]], Rows]
"""(model, canonical weight, module -> full tensor name) -> its rows."""


def same(module: str, *, transposed: bool = False, kind: str | None = None) -> Maker:
    """The same rows under another name; `kind` where the tensor is not called `weight` or `bias`, e.g. `scale`."""
    if kind is None:
        return stack(module, transposed=transposed)

    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        return [Piece(f"{name(module).rpartition('.')[0]}.{kind}", range(weight.shape[0]))]
    return make


def stack(*modules: str, transposed: bool = False) -> Maker:
    """Equal shares of the rows, one tensor below the other, e.g. gate then up."""
    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        share = range(weight.shape[0] // len(modules))
        return [Piece(name(module), share, transposed and len(weight.shape) > 1) for module in modules]
    return make


def grouped(query: str, key: str, value: str) -> Maker:
    """Megatron's fused matrix, group by group, from three projections."""
    modules = {"q": query, "k": key, "v": value}

    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        rows = query_key_value_rows(spec.num_attention_heads, spec.groups, spec.head_dim)
        return [Piece(name(modules[kind]), piece) for kind, piece in rows]
    return make


def packed(module: str, *, transposed: bool = False) -> Maker:
    """Megatron's fused matrix from one tensor that holds all queries, then all keys, then all values."""
    def make(spec: ModelSpec, weight: Weight, name: Callable[[str], str]) -> Rows:
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.groups * spec.head_dim
        start = {"q": 0, "k": queries, "v": queries + keys}
        return [Piece(name(module), range(start[kind] + rows.start, start[kind] + rows.stop),
                      transposed and len(weight.shape) > 1)
                for kind, rows in query_key_value_rows(spec.num_attention_heads, spec.groups, spec.head_dim)]
    return make


def rules_of(spec: ModelSpec, names: Mapping[str, Maker], layer: str, family: str) -> Rules:
    """The rules of a model from a family's table.

    Args:
        names: canonical module without numbers, e.g. `mlp.experts.linear_fc1` -> its maker; a whole canonical name stands for
            a weight that is not called `weight` here and is there.
        layer: what Hugging Face names of a layer begin with; `{layer}` in it and `{expert}` in module names are filled in.
        family: for the error.

    Raises:
        ModelLinkError: the family has no name for a weight of this model.
    """
    rules = {}
    for canonical, weight in weights(spec).items():
        found = IN_LAYER.match(canonical)
        key, number, expert = (canonical, "", "") if found is None else (
            found["rest"] if found["expert"] is None else f"mlp.experts{found['rest']}", found["layer"], found["expert"] or "")
        module, kind = (key, "weight") if key in names else (key.rpartition(".")[0], key.rpartition(".")[2])
        if module not in names:
            raise ModelLinkError(f"the family {family} has no tensor for {canonical}", where="--model-type-hf",
                                 fix="the model has a feature that this family does not have")

        def full(theirs: str, kind: str = kind, start: str = layer if found else "", numbers: tuple[str, str] = (number, expert),
                 ) -> str:
            return f"{start}{theirs}.{kind}".replace("{layer}", numbers[0]).replace("{expert}", numbers[1])
        rules[canonical] = names[module](spec, weight, full)
    return rules


@dataclass(frozen=True)
class Target:
    """A Hugging Face tensor as rows of canonical ones; `transposed` where it is stored [in, out]."""

    shape: tuple[int, ...]
    rows: list[tuple[str, range]]
    transposed: bool = False


def inverse(spec: ModelSpec, rules: Mapping[str, Rows]) -> dict[str, Target]:
    """Hugging Face name -> the canonical rows it is made of, in the order of the forward pass.

    Raises:
        InternalError: the rules leave out a weight of the model or a row, or use a row twice.
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
            raise InternalError(f"the rule of {canonical} gives {row} rows, it has {weight.shape[0]}")
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
        targets[name] = Target(shape[::-1] if transposed else shape,
                               [(canonical, rows) for _, canonical, rows, _ in pieces], transposed)
    return targets
