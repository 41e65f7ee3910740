# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: their tensors under canonical names, and merging them into the weights of the model.

The adapter of a linear layer is A [rank, in] and B [out, rank]; the layer's weight W then acts as W + scale x
B A (https://arxiv.org/abs/2106.09685, section 4.1). Canonical names are those of the layers:

    decoder.layers.0.self_attention.linear_qkv.lora_A.weight     and .lora_B.weight
    decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.lora_A.weight

The rank of a layer is the number of rows of its A; one scale holds for the whole adapter. Merging is lazy:
the result is a checkpoint that can be converted, compared and streamed as any other.

Not here: peft folders (peft.py) and Megatron checkpoints with adapters (megatron/model.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.source import Checkpoint, refuse_left_over, refuse_shape
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage.tensors import Assembled
from modellink.ckpt_convert.weights import Weight, weights
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    import torch

    Matrix = Assembled | torch.Tensor
    """A tensor in a file or in memory."""

A, B, LORA = ".lora_A.weight", ".lora_B.weight", ".lora_"
# rows of a product computed together, always the same ones, so that rounding does not depend on the sharding
TILE = 64


def adapter_weights(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]],
                    where: Path | str) -> dict[str, Weight]:
    """Return the tensors of an adapter in the order of the forward pass, with shapes and how tensor
    parallelism splits them.

    If a layer is split by columns, so is its A, and B is replicated; otherwise A is replicated and B is split
    by rows.

    Args:
        shapes: canonical name -> shape.
        where: for the error.

    Raises:
        ModelLinkError: the model has no layer of that name, A or B is missing, or a shape does not fit.
    """
    found: dict[str, Weight] = {}
    for name, weight in weights(spec).items():
        first, second = (name.removesuffix(".weight") + side for side in (A, B))
        if not is_linear(name, weight) or not {first, second} & shapes.keys():
            continue
        for one, other in ((first, second), (second, first)):
            if one not in shapes:
                raise ModelLinkError(f"{one} is missing, but {other} is present", where=where,
                                     fix="the adapter is incomplete")
        rank = shapes[first][0] if shapes[first] else 0
        found[first], found[second] = sides(weight, rank)
    refuse_left_over((name for name in shapes if name not in found), Path(where))
    for name, weight in found.items():
        refuse_shape(name, shapes[name], weight.shape, Path(where))
    if not found:
        raise ModelLinkError("it has no LoRA tensors", where=where)
    return found


def on_disk(name: str) -> str:
    """Return the name in a Megatron checkpoint, in which the original inserts peft's adapter name `default`."""
    return re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name)


def sides(weight: Weight, rank: int) -> tuple[Weight, Weight]:
    """Return A and B of a linear layer with that weight."""
    rows, columns = weight.shape
    if weight.split == "row":
        return Weight((rank, columns), "row"), Weight((rows, rank), "replicated")
    return Weight((rank, columns), "replicated"), Weight((rows, rank), weight.split)


def is_linear(name: str, weight: Weight) -> bool:
    """Return whether a weight can have an adapter: it is the matrix of a linear layer."""
    return len(weight.shape) == 2 and name.endswith(".weight") and not name.startswith("embedding.")


def merge_lora(source: Checkpoint, config: AdapterConfig, tensors: Mapping[str, Matrix]) -> Checkpoint:
    """Return `source` with the adapter merged into its weights: W + scale x B A.

    The sum is computed in fp32 (fp64 for fp64 weights) and rounded once to the weight's dtype.

    Args:
        tensors: canonical name -> A or B, e.g. from `peft.read_peft`.

    Raises:
        ModelLinkError: the adapter does not fit the model.
    """
    known = adapter_weights(source.spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()},
                            source.folder)
    merged = dict(source.tensors)
    for first in known:
        if not first.endswith(A):
            continue
        module = first.removesuffix(A)
        base = merged[module + ".weight"]
        merged[module + ".weight"] = Merged(name=base.name, shape=base.shape, parts=base.parts,
                                            first=tensors[first], second=tensors[module + B],
                                            scale=config.scale)
    return replace(source, tensors=merged, merged=config)


def config_of(arguments: Mapping[str, object], tensors: Mapping[str, Matrix], r: int | None,
              alpha: float | None, where: Path) -> AdapterConfig:
    """Return the configuration of an adapter in a Megatron checkpoint, from its arguments and the user's
    options.

    Raises:
        ModelLinkError: they contradict each other or the tensors, or the scale is unknown.
    """
    given: dict[str, float | None] = {"lora_r": r, "lora_alpha": alpha}
    for name, mine in given.items():
        theirs = arguments.get(name)
        flag = "--" + name.replace("_", "-")
        if isinstance(theirs, (int, float)) and mine is not None and theirs != mine:
            raise ModelLinkError(f"{flag} is {mine:g} and {theirs:g} in the adapter's arguments",
                                 where=f"{flag}, {where}")
        if mine is None and isinstance(theirs, (int, float)):
            given[name] = theirs
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith(A)})
    if given["lora_r"] is None and len(ranks) == 1:
        given["lora_r"] = ranks[0]
    if given["lora_r"] is None or given["lora_alpha"] is None:
        raise ModelLinkError("rank and alpha of the adapter are not recorded", where=where,
                             fix="give --lora-r and --lora-alpha")
    if given["lora_r"] < 1 or any(rank % given["lora_r"] for rank in ranks):
        raise ModelLinkError(f"the rank is {given['lora_r']:g}, but the adapter's matrices have rank {ranks}",
                             where=f"--lora-r, {where}", option="lora_r")
    return AdapterConfig(int(given["lora_r"]), given["lora_alpha"])


def full(matrix: Matrix) -> torch.Tensor:
    """Return all rows of a matrix."""
    return rows_of(matrix, [range(matrix.shape[0])])


def rows_of(matrix: Matrix, pieces: Sequence[range]) -> torch.Tensor:
    """Return rows of a matrix, concatenated in order."""
    if isinstance(matrix, Assembled):
        return matrix.read(pieces, 0)
    import torch

    matrix = matrix.detach().cpu()
    if len(pieces) == 1:
        return matrix[pieces[0].start:pieces[0].stop]
    return torch.cat([matrix[piece.start:piece.stop] for piece in pieces])


@dataclass(frozen=True, kw_only=True)
class Merged(Assembled):
    """A weight with an adapter added to it."""

    first: Matrix
    second: Matrix
    scale: float

    def files(self) -> set[Path]:
        adapters = (matrix.files() for matrix in (self.first, self.second) if isinstance(matrix, Assembled))
        return super().files().union(*adapters)

    def read(self, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        import torch

        base = super().read(pieces, dim, across)
        across = range(self.shape[1 - dim]) if across is None else across
        rows, columns = (pieces, [across]) if dim == 0 else ([across], pieces)
        dtype = torch.promote_types(base.dtype, torch.float32)
        first, at = full(self.first).to(dtype), 0
        made = torch.empty_like(base)
        for piece in rows:
            for start, delta in self._products(piece, first, dtype):
                delta = torch.cat([delta[:, span.start:span.stop] for span in columns], 1)
                there = slice(at + start, at + start + len(delta))
                made[there] = base[there].to(dtype).add_(delta).to(base.dtype)
            at += len(piece)
        return made

    def _products(self, piece: range, first: torch.Tensor,
                  dtype: torch.dtype) -> Iterable[tuple[int, torch.Tensor]]:
        """Yield scale x B A for the rows `piece`, tile by tile, each with its offset from the start of
        `piece`."""
        for tile in range(piece.start // TILE * TILE, piece.stop, TILE):
            rows = range(tile, min(tile + TILE, self.shape[0]))
            product = (rows_of(self.second, [rows]).to(dtype) @ first).mul_(self.scale)
            start, stop = max(rows.start, piece.start), min(rows.stop, piece.stop)
            yield start - piece.start, product[start - tile:stop - tile]
