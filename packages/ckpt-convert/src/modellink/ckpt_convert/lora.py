"""LoRA adapters: their tensors under canonical names, and merging them into the weights they belong to.

An adapter of a linear layer is A [rank, in] and B [out, rank]; with it the layer's weight W acts as W + scale x B A
(https://arxiv.org/abs/2106.09685, 4.1). Canonical names are those of the layers:

    decoder.layers.0.self_attention.linear_qkv.lora_A.weight     and .lora_B.weight
    decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.lora_A.weight

A layer's rank is the number of rows of its A; the scale is one for the whole adapter. Merging reads lazily: it gives a checkpoint
that can be converted, compared and streamed as any other.

Not here: adapter folders of peft (peft.py) and Megatron checkpoints that hold adapters (formats/megatron.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.formats.legacy import MODULES
from modellink.ckpt_convert.formats.tensors import Assembled
from modellink.ckpt_convert.source import Checkpoint, refuse_left_over, refuse_shape
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import Weight, weights
from modellink.kernels.errors import ModelLinkError

A, B, LORA = ".lora_A.weight", ".lora_B.weight", ".lora_"
TILE = 64  # rows that are multiplied at once, always the same ones, so that sums do not depend on how a matrix is cut

Matrix = Assembled | torch.Tensor
"""A tensor in a file or in memory."""


def adapter_weights(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], where: Path | str) -> dict[str, Weight]:
    """The tensors of an adapter in the order of the forward pass, with their shapes and how tensor parallelism cuts them.

    A layer whose columns are cut has its A cut likewise and B whole; others have A whole and B cut as their rows.

    Args:
        shapes: canonical name -> shape.
        where: for the error.

    Raises:
        ModelLinkError: nothing of the model has that name, A or B is missing, or a shape does not fit.
    """
    found: dict[str, Weight] = {}
    for name, weight in weights(spec).items():
        first, second = (name.removesuffix(".weight") + side for side in (A, B))
        if not is_linear(name, weight) or not {first, second} & shapes.keys():
            continue
        for one, other in ((first, second), (second, first)):
            if one not in shapes:
                raise ModelLinkError(f"{one} is missing, {other} is there", where=where, fix="the adapter is incomplete")
        rank = shapes[first][0] if shapes[first] else 0
        found[first], found[second] = sides(weight, rank)
    refuse_left_over((name for name in shapes if name not in found), Path(where))
    for name, weight in found.items():
        refuse_shape(name, weight, shapes[name], weight.shape, Path(where))
    if not found:
        raise ModelLinkError("there is no LoRA tensor in it", where=where)
    return found


def on_disk(name: str) -> str:
    """The name in a Megatron checkpoint, where the original has peft's name of the adapter, `default`, in it."""
    return re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name)


def sides(weight: Weight, rank: int) -> tuple[Weight, Weight]:
    """A and B of a linear layer with that weight."""
    rows = weight.split == "row"
    return (Weight((rank, weight.shape[1]), "row" if rows else "replicated"),
            Weight((weight.shape[0], rank), "replicated" if rows else weight.split))


def is_linear(name: str, weight: Weight) -> bool:
    """Whether an adapter can belong to it: a matrix that is multiplied with, no embedding."""
    return len(weight.shape) == 2 and name.endswith(".weight") and not name.startswith("embedding.")


def merge_lora(source: Checkpoint, config: AdapterConfig, tensors: Mapping[str, Matrix]) -> Checkpoint:
    """The checkpoint whose weights are those of `source` with the adapter merged in: W + scale x B A, in fp32 (of an fp64 weight
    in fp64), rounded once to the weight's own dtype.

    Args:
        tensors: canonical name -> A or B, e.g. as `peft.read_peft` gives them.

    Raises:
        ModelLinkError: the adapter does not fit the model.
    """
    known = adapter_weights(source.spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source.folder)
    merged = dict(source.tensors)
    for first in known:
        if not first.endswith(A):
            continue
        module = first.removesuffix(A)
        base = merged[module + ".weight"]
        merged[module + ".weight"] = Merged(name=base.name, shape=base.shape, parts=base.parts, first=tensors[first],
                                            second=tensors[module + B], scale=config.scale)
    return replace(source, tensors=merged, merged=config)


def config_of(arguments: Mapping[str, object], tensors: Mapping[str, Matrix], r: int | None, alpha: float | None,
              where: Path) -> AdapterConfig:
    """The configuration of an adapter in a Megatron checkpoint: from its arguments, and what the user says.

    Raises:
        ModelLinkError: they contradict each other or the tensors, or the scale is not said.
    """
    told: dict[str, float | None] = {"lora_r": r, "lora_alpha": alpha}
    for name, mine in told.items():
        theirs = arguments.get(name)
        flag = "--" + name.replace("_", "-")
        if isinstance(theirs, (int, float)) and mine is not None and theirs != mine:
            raise ModelLinkError(f"{flag} is {mine:g} and {theirs:g} in the adapter's arguments", where=f"{flag}, {where}")
        told[name] = mine if mine is not None else theirs if isinstance(theirs, (int, float)) else None
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith(A)})
    if told["lora_r"] is None and len(ranks) == 1:
        told["lora_r"] = ranks[0]
    if told["lora_r"] is None or told["lora_alpha"] is None:
        raise ModelLinkError("the adapter does not say how it is scaled", where=where, fix="give --lora-r and --lora-alpha")
    if told["lora_r"] < 1 or any(rank % told["lora_r"] for rank in ranks):
        raise ModelLinkError(f"the rank is {told['lora_r']:g}, the adapter's matrices have {ranks}", where=f"--lora-r, {where}")
    return AdapterConfig(int(told["lora_r"]), told["lora_alpha"])


def check_targets(names: Iterable[str], told: str | None) -> None:
    """Raise unless an adapter has exactly the modules that the user names (those of Megatron-Core or Megatron-Legacy).

    Raises:
        ModelLinkError: it has others.
    """
    if told is None:
        return
    found = {name.rpartition(LORA)[0].rpartition(".")[2] for name in names}
    legacy = {theirs.rpartition(".")[2]: ours.rpartition(".")[2] for ours, theirs in MODULES.items()}
    wanted = {legacy.get(name, name) for name in told.replace(",", " ").split()}
    if found != wanted:
        raise ModelLinkError(f"the adapter has {', '.join(sorted(found))}, not {', '.join(sorted(wanted))}",
                             where="--lora-target-modules")


def whole(matrix: Matrix) -> torch.Tensor:
    return rows_of(matrix, [range(matrix.shape[0])])


def rows_of(matrix: Matrix, pieces: Sequence[range]) -> torch.Tensor:
    """Rows of a matrix, joined in order."""
    if isinstance(matrix, Assembled):
        return matrix.read(pieces, 0)
    matrix = matrix.detach().cpu()
    return matrix[pieces[0].start:pieces[0].stop] if len(pieces) == 1 else torch.cat([matrix[p.start:p.stop] for p in pieces])


@dataclass(frozen=True, kw_only=True)
class Merged(Assembled):
    """A weight and what an adapter adds to it."""

    first: Matrix
    second: Matrix
    scale: float

    def files(self) -> set[Path]:
        adapters = (matrix.files() for matrix in (self.first, self.second) if isinstance(matrix, Assembled))
        return super().files().union(*adapters)

    def read(self, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        base = super().read(pieces, dim, across)
        across = range(self.shape[1 - dim]) if across is None else across
        rows, columns = (pieces, [across]) if dim == 0 else ([across], pieces)
        dtype = torch.promote_types(base.dtype, torch.float32)
        first, at = whole(self.first).to(dtype), 0
        made = torch.empty_like(base)
        for piece in rows:
            for start, delta in self._products(piece, first, dtype):
                delta = torch.cat([delta[:, span.start:span.stop] for span in columns], 1)
                there = slice(at + start, at + start + len(delta))
                made[there] = base[there].to(dtype).add_(delta).to(base.dtype)
            at += len(piece)
        return made

    def _products(self, piece: range, first: torch.Tensor, dtype: torch.dtype) -> Iterable[tuple[int, torch.Tensor]]:
        """scale x B A for the rows `piece`, tile by tile, with the place of each from the start of `piece`."""
        for tile in range(piece.start // TILE * TILE, piece.stop, TILE):
            rows = range(tile, min(tile + TILE, self.shape[0]))
            product = (rows_of(self.second, [rows]).to(dtype) @ first).mul_(self.scale)
            start, stop = max(rows.start, piece.start), min(rows.stop, piece.stop)
            yield start - piece.start, product[start - tile:stop - tile]
