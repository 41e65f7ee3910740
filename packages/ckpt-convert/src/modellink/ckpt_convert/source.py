# SPDX-License-Identifier: Apache-2.0
"""`Checkpoint`: an opened checkpoint of any format, as canonical tensors that are read on demand.

Opening one reads names, shapes and sizes, and checks that every weight of the model is present with its shape
and that none is left over; it reads no data. Not here: detecting the format of a folder (open.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage.tensors import Assembled, Part, torch_dtype
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

SHOWN = 8  # names in one message
SMALL = 20_000  # rows of a table that is made in about a second


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; implements `weights.Source`.

    Attributes:
        format: title of the format, for people.
        layout: of the files; a Hugging Face folder has one rank.
        iteration: of the files; None if the format has no iterations.
        adapter: the configuration, if the tensors are a LoRA adapter of the model and not its weights.
        merged: the configuration of a LoRA adapter that is merged into the weights.
        copies: all copies of the weights that several ranks hold, the one in `tensors` first; see replicas.py.
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
    copies: Mapping[str, Sequence[Assembled]] = field(default_factory=dict)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        return self.tensors[name].read(pieces, dim, across)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        return torch_dtype(self.main_kind)

    @property
    def main_kind(self) -> str:
        """The name of the dtype of most parameters."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.kind] += prod(tensor.shape)
        return sizes.most_common(1)[0][0]

    @property
    def lora(self) -> str | None:
        """A description of its LoRA adapter, for people."""
        config = self.merged or self.adapter
        if config is None:
            return None
        what = "merged with a LoRA adapter" if self.merged else "LoRA adapter"
        return f"{what} of rank {config.r}, alpha {config.alpha:g}"

    def describe(self) -> str:
        details = [self.format, str(self.layout), self.main_kind]
        if self.lora:
            details.append(self.lora)
        if self.iteration is not None:
            details.append(f"iteration {self.iteration}")
        return ", ".join(details)

    def files(self) -> list[Path]:
        """Return the files that hold the weights."""
        return sorted(set().union(*(tensor.files() for tensor in self.tensors.values())))


def assemble(spec: ModelSpec, parts: Mapping[str, Sequence[Part]], folder: Path) -> dict[str, Assembled]:
    """Return the canonical tensors of a model, assembled from parts by canonical name.

    Raises:
        ModelLinkError: a weight has no parts or is not covered by them.
    """
    known = weights(spec)
    refuse_missing((name for name in known if name not in parts), folder)
    tensors = {name: Assembled(name, weight.shape, tuple(parts[name])) for name, weight in known.items()}
    for tensor in tensors.values():
        tensor.check()
    return tensors


def refuse_larger(spec: ModelSpec, where: Path, *, numbers: int, tensors: int | None = None) -> None:
    """Raise a ModelLinkError if the model is larger than its files, before a table with its layers and experts is made.

    Args:
        numbers: upper bound of the numbers that the files hold.
        tensors: how many tensors the files hold, if each layer and each expert has tensors of its own.
    """
    first, step = spec.first_k_dense_replace, spec.moe_layer_freq
    expert_layers = max(0, ceil(spec.num_layers / step) - ceil(first / step)) if spec.num_experts else 0
    experts = expert_layers * (spec.num_experts or 0)
    if spec.num_layers * (8 + spec.groups) + experts < SMALL:
        return  # the missing weights can be listed by name
    attention = spec.num_layers * spec.num_attention_heads * spec.head_dim
    least = spec.num_layers * spec.hidden_size + attention + experts * spec.hidden_size * spec.expert_ffn
    if least <= numbers and (tensors is None or max(spec.num_layers, experts) <= tensors):
        return
    held = f"{numbers:,} numbers" if tensors is None else f"{tensors:,} tensors with {numbers:,} numbers"
    of_experts = f", {spec.num_experts:,} experts" if spec.num_experts else ""
    raise ModelLinkError(f"the configuration describes a larger model ({spec.num_layers:,} layers{of_experts}, "
                         f"{spec.num_attention_heads:,} heads) than the weight files can hold ({held})", where=where,
                         fix="files are missing, or the configuration and the weights belong to different models")


def refuse_missing(names: Iterable[str], folder: Path) -> None:
    """Raise a ModelLinkError if there are names: those of missing weights."""
    if missing := list(names):
        raise ModelLinkError(f"{_count(missing)} missing: {_some(missing)}", where=folder,
                             fix="the files are incomplete, or the configuration describes another model")


def refuse_left_over(names: Iterable[str], folder: Path) -> None:
    """Raise a ModelLinkError if there are names: those of weights the model does not have, but for a few
    harmless buffers."""
    harmless = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "_extra_state")
    if unknown := [name for name in names if not name.endswith(harmless)]:
        raise ModelLinkError(f"{_count(unknown)} not part of this model: {_some(unknown)}", where=folder,
                             fix="the configuration describes another model, or the family does not support this feature")


def refuse_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], where: Path) -> None:
    """Raise a ModelLinkError if a tensor does not have the expected shape."""
    if found != expected:
        raise ModelLinkError(f"{name} has the shape {list(found)}; by the configuration it is "
                             f"{list(expected)}", where=where,
                             fix="the configuration and the weights belong to different models")


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'s are' if len(names) > 1 else ' is'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
