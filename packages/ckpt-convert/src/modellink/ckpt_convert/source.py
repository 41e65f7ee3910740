"""`Checkpoint`: an opened checkpoint of any format, as canonical tensors that are read when asked for.

Opening one reads names, shapes and sizes, checks that every weight of the model is there with the right shape and that no
weight is left over, and reads no number. Not here: finding out which format a folder has (open.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.formats.tensors import Assembled, Part
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import Weight, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

SHOWN = 8  # names in one message


@dataclass(frozen=True)
class Checkpoint:
    """See `weights.Source` for what it promises.

    `layout` and `iteration` are those of the files; a Hugging Face folder has one rank and no iteration. `adapter` is there
    where the tensors are a LoRA adapter of the model and not its weights, `merged` where one is merged into them.
    """

    format: str
    folder: Path
    spec: ModelSpec
    family: str
    companions: Path
    tensors: Mapping[str, Assembled]
    layout: ParallelLayout = ParallelLayout()
    iteration: int | None = None
    prompt_type: str | None = None
    adapter: AdapterConfig | None = None
    merged: AdapterConfig | None = None

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        return self.tensors[name].read(pieces, dim, across)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype most numbers have."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += prod(tensor.shape)
        return sizes.most_common(1)[0][0]

    @property
    def lora(self) -> str | None:
        """What it has to do with LoRA, for people."""
        what = "merged with a LoRA adapter" if self.merged else "LoRA adapter"
        config = self.merged or self.adapter
        return f"{what} of rank {config.r}, alpha {config.alpha:g}" if config else None

    def describe(self) -> str:
        where = "" if self.iteration is None else f", iteration {self.iteration}"
        told = [self.format, str(self.layout), str(self.main_dtype).removeprefix("torch."), *filter(None, [self.lora])]
        return ", ".join(told) + where

    def files(self) -> list[Path]:
        """The files the weights lie in."""
        return sorted(set().union(*(tensor.files() for tensor in self.tensors.values())))


def assemble(spec: ModelSpec, parts: Mapping[str, Sequence[Part]], folder: Path) -> dict[str, Assembled]:
    """The canonical tensors of a model from parts by canonical name.

    Raises:
        ModelLinkError: a weight has no part or is not covered by its parts.
    """
    known = weights(spec)
    refuse_missing((name for name in known if name not in parts), folder)
    tensors = {name: Assembled(name, weight.shape, tuple(parts[name])) for name, weight in known.items()}
    for tensor in tensors.values():
        tensor.check()
    return tensors


def refuse_missing(names: Iterable[str], folder: Path) -> None:
    if missing := list(names):
        raise ModelLinkError(f"{_count(missing)} missing: {_some(missing)}", where=folder,
                             fix="the files are incomplete, or the configuration describes another model")


def refuse_left_over(names: Iterable[str], folder: Path) -> None:
    """Raise where a checkpoint holds weights that the model does not have (rotary frequencies and empty states aside)."""
    harmless = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "_extra_state")
    if unknown := [name for name in names if not name.endswith(harmless)]:
        raise ModelLinkError(f"{_count(unknown)} not part of this model: {_some(unknown)}", where=folder,
                             fix="the configuration describes another model, or the family does not support this feature")


def refuse_shape(name: str, weight: Weight, found: tuple[int, ...], expected: tuple[int, ...], where: Path) -> None:
    if found != expected:
        raise ModelLinkError(f"{name} has the shape {list(found)}; the configuration gives {list(expected)}", where=where,
                             fix="the configuration and the weights belong to different models")


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'s are' if len(names) > 1 else ' is'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
