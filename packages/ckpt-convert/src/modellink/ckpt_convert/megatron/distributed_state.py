# SPDX-License-Identifier: Apache-2.0
"""The files of a distributed checkpoint as megatron-core loads it: `__N_0.distcp`, `.metadata`, `common.pt`,
`metadata.json`.

Tensors are unsharded: each loader reads its part. If all layers are alike they are one tensor with a leading
axis, as in megatron-core; experts of a layer always are. A chunk of such a tensor is the weight of one layer
(and expert), a torch.save archive of its own. Vocabularies have their true size; megatron-core allows the
difference.

Every linear module has an `_extra_state` object, which megatron-core expects; without Transformer Engine it
is [None].

Not here: optimizer states. Reading is distributed.py.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from typing import Any

from modellink.ckpt_convert.megatron.distributed import METADATA, STACKED
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage import archive
from modellink.ckpt_convert.storage.writing import FileLayout, Planned
from modellink.ckpt_convert.weights import IN_LAYER, LAYERS

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}


def alike(spec: ModelSpec) -> bool:
    """Return whether all layers have the same weights."""
    return len({(layer.experts, layer.ffn) for layer in spec.layers}) == 1


def stacked(name: str, spec: ModelSpec) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return (name in the checkpoint, sizes of the leading axes, index along them) of a canonical weight."""
    found = IN_LAYER.match(name)
    if found is None:
        return name, (), ()
    layer, axes, index = f"{found['layer']}.", [], []
    if alike(spec):
        layer, axes, index = "", [spec.num_layers], [int(found["layer"])]
    if found["expert"] is None:
        return f"{LAYERS}{layer}{found['rest']}", tuple(axes), tuple(index)
    full = f"{LAYERS}{layer}{STACKED}{found['rest'].removeprefix('.')}"
    return full, (*axes, spec.num_experts or 0), (*index, int(found["expert"]))


def files(tensors: Mapping[str, Planned], spec: ModelSpec, arguments: object, *, iteration: int,
          shard_bytes: int) -> dict[str, FileLayout]:
    """Return name -> layout of every file; the files of metadata come last."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    parts: list[list[FileLayout]] = [[]]
    sizes = [0]
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    nothing = archive.layout([None])
    for canonical, planned in tensors.items():
        name, axes, index = stacked(canonical, spec)
        offsets = torch.Size((*index, *[0] * len(planned.shape)))
        chunk = Planned(planned.dtype, (*[1] * len(axes), *planned.shape), planned.blocks)
        layout = archive.layout(chunk, canonical)
        if sizes[-1] and sizes[-1] + layout.size > shard_bytes:
            parts.append([])
            sizes.append(0)
        places[MetadataIndex(name, offsets)] = _StorageInfo(f"__{len(parts) - 1}_0.distcp", sizes[-1],
                                                            layout.size)
        parts[-1].append(layout.shifted(sizes[-1]))
        sizes[-1] += layout.size
        if len(planned.shape) > 1 and IN_LAYER.match(canonical) and name.endswith(".weight"):
            key = f"{name.removesuffix('weight')}_extra_state/shard_{numbered(index or (0,))}_{numbered(axes or (1,))}"
            entries[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(f"__{len(parts) - 1}_0.distcp", sizes[-1], nothing.size)
            parts[-1].append(nothing.shifted(sizes[-1]))
            sizes[-1] += nothing.size
        entry = entries.setdefault(name, TensorStorageMetadata(
            TensorProperties(dtype=planned.dtype), torch.Size((*axes, *planned.shape)), []))
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.shape)))
    found = {f"__{number}_0.distcp": _joined(part, size)
             for number, (part, size) in enumerate(zip(parts, sizes, strict=True))}
    common: dict[str, Any] = {
        "args": arguments, "checkpoint_version": 3.0, "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"non_homogeneous_layers": not alike(spec)}}
    found["common.pt"] = archive.layout(common)
    found["metadata.json"] = _bytes(json.dumps(BACKEND).encode())
    found[METADATA] = _bytes(pickle.dumps(Metadata(entries, None, places)))
    return found


def numbered(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _joined(layouts: list[FileLayout], size: int) -> FileLayout:
    return FileLayout(size, tuple(entry for layout in layouts for entry in layout.fixed),
                      tuple(slot for layout in layouts for slot in layout.slots))


def _bytes(content: bytes) -> FileLayout:
    return FileLayout(len(content), ((0, content),), ())
