# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: config.json, weights in one file or in shards with an index, tokenizer files.

Weights are read from safetensors or, if a folder has none, from `pytorch_model*.bin` by our pickle reader.
Written are safetensors. Not here: remote code, downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.ckpt_convert import blocks, manifest
from modellink.ckpt_convert.families import family_of, fitting, read_spec
from modellink.ckpt_convert.family import config_of
from modellink.ckpt_convert.format import SHARD_BYTES, Format, OpenRequest, WriteRequest
from modellink.ckpt_convert.formats import register
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.plan import ConversionPlan, PlannedFile
from modellink.ckpt_convert.rules import HFTensor, inverse
from modellink.ckpt_convert.source import (
    Checkpoint,
    assemble,
    refuse_larger,
    refuse_left_over,
    refuse_missing,
    refuse_shape,
)
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage import safetensors
from modellink.ckpt_convert.storage.pickle import read_archive
from modellink.ckpt_convert.storage.tensors import FLOATING, Part, Stored, as_bytes
from modellink.ckpt_convert.storage.writing import Planned
from modellink.ckpt_convert.weights import EMBEDDING, OUTPUT
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json, write_json
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@register
class HuggingFace(Format):
    name = "hf"
    title = "Hugging Face"
    evidence = f"{SINGLE}, {PICKLED} or their index (Hugging Face)"

    def recognize(self, folder: Path) -> bool:
        return is_huggingface(folder)

    def open(self, request: OpenRequest) -> Checkpoint:
        request.refuse_iteration()
        return open_folder(request.path, request.family)

    def plan(self, source: Checkpoint, request: WriteRequest) -> ConversionPlan:
        return plan_huggingface(source, dtype=request.dtype, shard_bytes=request.shard_bytes)

    def write_companions(self, plan: ConversionPlan, folder: Path, described: manifest.Manifest,
                         config: Mapping[str, Any]) -> None:
        for path in manifest.companion_files(plan.source.companions):
            manifest.copy_file(path, folder / path.name)
        write_json(folder / "config.json", config)
        for name, content in plan.json_files.items():
            write_json(folder / name, content)
        if described.prompt_type is not None:  # everything else is in config.json
            manifest.write_manifest(folder, described)


def is_huggingface(folder: Path) -> bool:
    """Return whether a folder has weights under Hugging Face file names."""
    return any((folder / name).exists() for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX))


def open_folder(folder: Path, family: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder.

    Raises:
        ModelLinkError: something is missing, damaged or not supported; it names the file, key or tensor.
    """
    spec, family = read_spec(Config.load(folder), family)
    found = _weights(folder, family)
    refuse_larger(spec, folder, tensors=len(found), numbers=sum(prod(stored.shape) for stored in found.values()))
    rules = family_of(family).rules(spec)
    if spec.tied:
        _drop_tied_copy(found, family, spec)
    targets = inverse(spec, rules)
    try:
        refuse_missing((name for name in targets if name not in found), folder)
        refuse_left_over((name for name in found if name not in targets), folder)
    except ModelLinkError as error:
        if others := fitting(Config.load(folder), found):
            raise ModelLinkError(error.what, where=folder,
                                 fix=f"it was read as {family}, but these are the weights of the "
                                     f"family {' or '.join(others)}") from None
        raise
    for name, target in targets.items():
        refuse_shape(name, found[name].shape, target.shape, found[name].path)
    parts: dict[str, list[Part]] = {}
    for canonical, rows in rules.items():
        parts[canonical], row = [], 0
        for name, piece, transposed in rows:
            stored = found[name].flipped if transposed else found[name]
            parts[canonical].append(Part(stored, piece, range(stored.columns), (row, 0)))
            row += len(piece)
    described = manifest.read_manifest(folder)
    return Checkpoint(HuggingFace.title, folder, spec, family, folder, assemble(spec, parts, folder),
                      prompt_type=described.prompt_type if described else None)


def _weights(folder: Path, family: str) -> dict[str, Stored]:
    """Return the tensors of a folder under the names of the family's class, without buffers."""
    about = family_of(family)
    found = {name: stored for name, stored in _stored(folder).items() if not name.endswith(about.buffers)}
    # saved from the class without a head
    if about.prefix and not any(name.startswith(about.prefix) for name in found):
        found = {about.prefix + name: stored for name, stored in found.items()}
    return found


def _stored(folder: Path) -> dict[str, Stored]:
    for single, index, read in [(SINGLE, INDEX, safetensors.stored), (PICKLED, PICKLED_INDEX, pickled)]:
        if (folder / single).exists():
            return read(folder / single)
        if (folder / index).exists():
            return _sharded(folder / index, read)
    raise AssertionError(folder)


def pickled(path: Path) -> dict[str, Stored]:
    """Return the tensors of a `pytorch_model*.bin` by name.

    Raises:
        ModelLinkError: the file is missing, damaged or truncated, or has tensors that are not floating point.
    """
    content = read_archive(path)
    if not isinstance(content, Mapping):
        raise ModelLinkError("the file has no tensors by name", where=path)
    found = {str(name): value for name, value in content.items() if isinstance(value, Stored)}
    for name, stored in found.items():
        # causal masks of old files have this name
        if stored.kind not in FLOATING and not name.endswith("bias"):
            raise ModelLinkError(f"{name} is stored as {stored.kind}; only floating point is supported",
                                 where=path, fix="dequantize the weights first")
    return found


def _sharded(path: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    """Return the tensors of all shards that an index lists."""
    index: Any = read_json(path)
    mapped = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise ModelLinkError("the index has no weight_map", where=path)
    for file in mapped.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ModelLinkError(f"the index names {file!r}, which is not a file name of this folder",
                                 where=path, fix="do not use this checkpoint: its index refers to other folders")
    found: dict[str, Stored] = {}
    for file in sorted(set(mapped.values())):
        found |= read(path.parent / file)
    if ghosts := [name for name, file in mapped.items() if name not in found
                  or found[name].path.name != file]:
        raise ModelLinkError(f"{ghosts[0]} is not in {mapped[ghosts[0]]}, where the index places it",
                             where=path, fix="the shards and the index belong to different models; copy all "
                                             "of them again")
    return found


def _drop_tied_copy(found: dict[str, Stored], family: str, spec: ModelSpec) -> None:
    """Remove the output layer of a tied model if it equals the embedding; if it does not, the model is not
    tied."""
    untied = ModelSpec(**spec.to_dict() | {"untie_embeddings_and_output_weights": True})
    rules = family_of(family).rules(untied)
    embedding, output = rules[EMBEDDING][0].name, rules[OUTPUT][0].name
    if output not in found or embedding not in found:
        return
    first, second = found[embedding], found[output]
    same = first.shape == second.shape and first.kind == second.kind
    step = max(1, (64 << 20) // max(1, first.columns))
    for start in range(0, first.shape[0] if same else 0, step):
        rows, columns = range(start, min(start + step, first.shape[0])), range(first.columns)
        same = same and as_bytes(first.read(rows, columns)) == as_bytes(second.read(rows, columns))
    if not same:
        raise ModelLinkError(f"tie_word_embeddings is true, but {output} differs from {embedding}",
                             where=second.path, fix="set tie_word_embeddings to false in config.json, or "
                                                    "remove the tensor")
    del found[output]


def plan_huggingface(source: Checkpoint, *, dtype: torch.dtype | None = None,
                     shard_bytes: int = SHARD_BYTES) -> ConversionPlan:
    """Plan a Hugging Face folder from any source."""
    targets = inverse(source.spec, family_of(source.family).rules(source.spec))
    tensors = {name: _planned(source, target, dtype) for name, target in targets.items()}
    shards = split_into_shards(tensors, shard_bytes)
    files = tuple(PlannedFile(name, safetensors.layout(shard)) for name, shard in shards.items())
    index = {INDEX: index_of(shards)} if len(shards) > 1 else {}
    return ConversionPlan(source, HuggingFace.name, HuggingFace.title, ParallelLayout(),
                          dtype or source.main_dtype, files, index)


def _planned(source: Checkpoint, target: HFTensor, dtype: torch.dtype | None) -> Planned:
    groups = [(canonical, [piece for _, piece in group])
              for canonical, group in groupby(target.rows, key=lambda entry: entry[0])]
    kind = dtype or source.dtype(groups[0][0])

    def rows() -> Iterator[torch.Tensor]:
        for canonical, pieces in groups:
            yield from blocks.rows_of(source, canonical, pieces, 0, kind)

    if not target.transposed:
        return Planned(kind, target.shape, rows)
    return blocks.transposed(Planned(kind, target.shape[::-1], rows))


def split_into_shards(tensors: Mapping[str, Planned],
                      limit: int = SHARD_BYTES) -> dict[str, dict[str, Planned]]:
    """Return file name -> tensors: shards of at most `limit` bytes in order; a larger tensor gets its own
    shard."""
    shards: list[dict[str, Planned]] = [{}]
    size = 0
    for name, planned in tensors.items():
        if shards[-1] and size + planned.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = planned
        size += planned.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
            for number, shard in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Mapping[str, Planned]]) -> dict[str, object]:
    """Return the content of model.safetensors.index.json."""
    total = sum(planned.nbytes for shard in shards.values() for planned in shard.values())
    return {"metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in shards.items() for name in shard}}


def config_for(spec: ModelSpec, family: str, companions: Path, dtype: str) -> dict[str, Any]:
    """Return the config.json to write: the one that came with the weights, or a new one.

    Raises:
        ModelLinkError: the one that came with the weights contradicts the model.
    """
    if (companions / "config.json").is_file():
        config = Config.load(companions)
        theirs, _ = read_spec(config, family)
        spec.refuse_contradiction(theirs, "the checkpoint", str(config.path))
        values = dict(config.values)
    else:
        values = config_of(family_of(family), spec)
    key = "dtype" if "dtype" in values else "torch_dtype"
    return values | {key: dtype}
