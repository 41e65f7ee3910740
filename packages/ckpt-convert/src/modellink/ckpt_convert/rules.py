"""How a canonical weight is made of Hugging Face weights, as row maps, and the inverse from the same map.

A rule lists, in the order of the canonical rows, which rows of which Hugging Face tensor they are. Columns are never
touched. The inverse answers which rows of which canonical tensors make up a Hugging Face tensor; it is computed, so both
directions cannot disagree, and it must be total: a row nobody maps is a fault of the family.

Not here: names (families/) and reading (formats/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import InternalError
from modellink.kernels.parallel import query_key_value_rows

Rows = list[tuple[str, range]]
"""(tensor, rows of it), joined in order."""
Rules = dict[str, Rows]
"""Canonical name -> the Hugging Face rows it is made of."""


def stacked(*tensors: tuple[str, int]) -> Rows:
    """All rows of each (name, rows) one below the other, e.g. gate then up."""
    return [(name, range(rows)) for name, rows in tensors]


def query_key_value(spec: ModelSpec, query: str, key: str, value: str) -> Rows:
    """Megatron's fused matrix, group by group, from three projections."""
    names = {"q": query, "k": key, "v": value}
    rows = query_key_value_rows(spec.num_attention_heads, spec.groups, spec.head_dim)
    return [(names[kind], piece) for kind, piece in rows]


@dataclass(frozen=True)
class Target:
    """A Hugging Face tensor as rows of canonical ones."""

    shape: tuple[int, ...]
    rows: Rows


def inverse(spec: ModelSpec, rules: Mapping[str, Rows]) -> dict[str, Target]:
    """Hugging Face name -> the canonical rows it is made of, in the order of the forward pass.

    Raises:
        InternalError: the rules leave out a weight of the model or a row, or use a row twice.
    """
    known = weights(spec)
    if rules.keys() != known.keys():
        raise InternalError(f"the rules and the model differ in {sorted(rules.keys() ^ known.keys())[:5]}")
    found: dict[str, list[tuple[range, str, range]]] = {}
    for canonical, weight in known.items():
        row = 0
        for name, piece in rules[canonical]:
            found.setdefault(name, []).append((piece, canonical, range(row, row + len(piece))))
            row += len(piece)
        if row != weight.shape[0]:
            raise InternalError(f"the rule of {canonical} gives {row} rows, it has {weight.shape[0]}")
    targets = {}
    for name, pieces in found.items():
        pieces.sort(key=lambda entry: entry[0].start)
        row = 0
        for piece, canonical, _ in pieces:
            if piece.start != row:
                how = "twice" if piece.start < row else "never"
                raise InternalError(f"row {min(row, piece.start)} of {name} is mapped {how}", where=canonical)
            row = piece.stop
        targets[name] = Target((row, *known[pieces[0][1]].shape[1:]), [(canonical, rows) for _, canonical, rows in pieces])
    return targets
