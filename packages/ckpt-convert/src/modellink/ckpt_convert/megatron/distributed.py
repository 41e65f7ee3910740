# SPDX-License-Identifier: Apache-2.0
"""Reading distributed checkpoints of PyTorch and Megatron-Core (`torch-dist`): `.metadata` and `__R_N.distcp`
files.

`.metadata` is a pickle that says which rectangle (offsets, sizes) of which tensor is stored in which bytes of
which file; those bytes are a torch.save archive. Both are read by our pickle reader. Layers are named one by
one, or stacked along a leading layer axis, as Megatron-Core does if all layers are alike. Optimizer states,
random states and objects are skipped.

Not here: writing (distributed_state.py), flattened (FSDP) and compressed tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import add
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.megatron.dialects import is_latent, our_name
from modellink.ckpt_convert.source import assemble, refuse_larger, refuse_left_over
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage.pickle import DTYPES, names, read_archive, read_pickle
from modellink.ckpt_convert.storage.tensors import Assembled, Part, Stored
from modellink.ckpt_convert.weights import EXPERTS, LAYERS, OUTPUT, Weight, weights
from modellink.kernels.errors import ModelLinkError

METADATA = ".metadata"
MODEL = ("decoder.", "embedding.", "output_layer.")
STACKED = "mlp.experts.experts."
"""Megatron-Core's name of the experts of a layer in such checkpoints."""

KNOWN = {"builtins.getattr", "torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath",
         "pathlib._local.PosixPath"} | {
    f"torch.{name}" for name in DTYPES} | {
    f"torch.distributed.checkpoint.{name}" for name in (
        "filesystem._StorageInfo", "metadata.BytesStorageMetadata", "metadata.ChunkStorageMetadata",
        "metadata.Metadata", "metadata.MetadataIndex", "metadata.StorageMeta", "metadata.TensorProperties",
        "metadata.TensorStorageMetadata", "metadata._MEM_FORMAT_ENCODING", "planner.SavePlan",
        "planner.TensorWriteData", "planner.WriteItem", "planner.WriteItemType",
        "planner.WriteItemType.TENSOR", "planner.WriteItemType.SHARD", "planner.WriteItemType.BYTE_IO",
        *(f"metadata._MEM_FORMAT_ENCODING.TORCH_{name}"
          for name in ("CONTIGUOUS_FORMAT", "CHANNELS_LAST", "PRESERVE_FORMAT")))}
"""The names that the metadata of checkpoints of megatron-core and PyTorch refers to; older Pythons pickle an
enum by getattr."""


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    shape: tuple[int, ...]
    chunks: list[Chunk]


def is_distributed(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read(folder: Path, spec: ModelSpec) -> dict[str, Assembled]:
    """Return the canonical tensors of an iteration folder.

    Raises:
        ModelLinkError: the metadata is damaged, a file is missing or truncated, or the weights do not fit
            `spec`.
    """
    entries = _entries(folder)
    files = {chunk.file for entry in entries.values() for chunk in entry.chunks}
    refuse_larger(spec, folder, numbers=sum(path.stat().st_size for path in files if path.is_file()))
    known = weights(spec)
    parts: dict[str, list[Part]] = {}
    left_over = []
    for name, entry in entries.items():
        axes_of = StackedName.of(name)
        first = axes_of.canonical((0, 0))
        if first == OUTPUT and spec.tied:
            continue
        if first not in known:
            left_over.append(name)
            continue
        axes = [spec.num_layers] if axes_of.layers else []
        if axes_of.experts:
            axes.append(spec.num_experts or 0)
        _check_shape(name, entry, known[first], axes, folder)
        for chunk in entry.chunks:
            for index, part in _parts(name, chunk, known[first], len(axes)):
                layer = index[0] if axes_of.layers else 0
                expert = index[-1] if axes_of.experts else 0
                parts.setdefault(axes_of.canonical((layer, expert)), []).append(part)
    refuse_left_over(left_over, folder)
    return assemble(spec, parts, folder)


@dataclass(frozen=True)
class StackedName:
    """A name in the metadata: its canonical form, and whether its tensor has leading axes for layers and
    experts."""

    name: str
    layers: bool
    experts: bool

    @classmethod
    def of(cls, name: str) -> StackedName:
        layers = name.startswith(LAYERS) and not name.removeprefix(LAYERS).split(".")[0].isdigit()
        if layers:
            name = f"{LAYERS}{{layer}}.{name.removeprefix(LAYERS)}"
        experts = STACKED in name and not name.partition(STACKED)[2].split(".")[0].isdigit()
        single = f"mlp.{EXPERTS}{{expert}}." if experts else f"mlp.{EXPERTS}"
        return cls(name.replace(STACKED, single), layers, experts)

    def canonical(self, numbers: tuple[int, int]) -> str:
        """Return the canonical name for (layer, expert); a number is ignored if it is not an axis."""
        return self.name.replace("{layer}", str(numbers[0])).replace("{expert}", str(numbers[1]))


def _entries(folder: Path) -> dict[str, Entry]:
    """Return the model's tensors by name."""
    metadata = read_pickle(folder / METADATA)
    try:
        fields = metadata.state
        places = {(key.state["fqn"], key.state.get("offset")): info.state
                  for key, info in fields["storage_data"].items()}
        found = {}
        latent = is_latent(map(str, fields["state_dict_metadata"]))
        for full, entry in fields["state_dict_metadata"].items():
            name = our_name(full.removeprefix("model."), latent=latent)
            if not name.startswith(MODEL) or not isinstance(entry.state,
                                                            Mapping) or "chunks" not in entry.state:
                continue
            boxes = [(box.state["offsets"], box.state["sizes"]) for box in entry.state["chunks"]]
            chunks = [_chunk(folder, full, offsets, sizes, places.get((full, offsets)))
                      for offsets, sizes in boxes]
            found[name] = Entry(entry.state["size"], chunks)
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelLinkError(f"not the metadata of a distributed checkpoint: {type(error).__name__} {error}",
                             where=folder / METADATA) from None
    return found


def _chunk(folder: Path, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...],
           place: Mapping[str, Any] | None) -> Chunk:
    if place is None:
        raise ModelLinkError(f"no file has the chunk of {name} at {list(offsets)}", where=folder / METADATA)
    file = place["relative_path"]
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
        raise ModelLinkError(f"the metadata names {file!r}, which is not a file name of this folder",
                             where=folder / METADATA,
                             fix="do not use this checkpoint: its metadata refers to other folders")
    if place.get("transform_descriptors"):
        raise ModelLinkError(f"{name} is stored compressed, which is not supported", where=folder / file)
    return Chunk(offsets, sizes, folder / file, place["offset"], place["length"])


def _check_shape(name: str, entry: Entry, weight: Weight, axes: list[int], folder: Path) -> None:
    expected = (*axes, *weight.shape)
    found = entry.shape
    if weight.split == "vocab" and found[1:] == expected[1:] and found[0] >= expected[0]:
        return  # padded
    if found != expected:
        raise ModelLinkError(f"{name} has the shape {list(found)}; by the configuration it is "
                             f"{list(expected)}", where=folder,
                             fix="the configuration and the weights belong to different models")


def _parts(name: str, chunk: Chunk, weight: Weight, axes: int) -> Iterator[tuple[tuple[int, ...], Part]]:
    """Yield (index along the leading axes, part) of each tensor that a chunk covers."""
    stored = read_archive(chunk.file, chunk.start, chunk.length)
    if not isinstance(stored, Stored) or prod(stored.shape) != prod(chunk.sizes):
        raise ModelLinkError(f"a chunk of {name} should have the shape {list(chunk.sizes)}", where=chunk.file)
    offsets, sizes = chunk.offsets[axes:], chunk.sizes[axes:]
    for number, index in enumerate(product(*map(range, chunk.sizes[:axes]))):
        shift = number * prod(sizes) * stored.itemsize
        single = Stored(stored.path, stored.offset + shift, stored.kind, sizes)
        # without the padding of a vocabulary
        rows = range(max(0, min(sizes[0], weight.shape[0] - offsets[0])))
        if len(rows):
            at = (offsets[0], offsets[1] if len(sizes) > 1 else 0)
            yield tuple(map(add, chunk.offsets, index)), Part(single, rows, range(single.columns), at)


def refuse_unknown_names(folder: Path) -> None:
    """Raise a ModelLinkError if the metadata names anything that a distributed checkpoint does not need.

    Call it before another reader, which unpickles the metadata and calls what it names, opens the folder.
    """
    unknown = names(folder / METADATA) - KNOWN
    if unknown:
        raise ModelLinkError(f"the metadata names {', '.join(sorted(unknown))}, which a checkpoint does not "
                             f"need",
                             where=folder / METADATA,
                             fix="do not open this checkpoint: it may run code, or an unknown program wrote it")
