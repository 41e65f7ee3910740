"""Hugging Face folders: config.json, weights in one file or in shards with an index, tokenizer files.

Weights are safetensors or, where a folder has none, `pytorch_model*.bin`, which go through our pickle reader. Written are
safetensors. Not here: remote code, downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.families import family_of, fitting, read_spec
from modellink.ckpt_convert.family import config_of
from modellink.ckpt_convert.formats import safetensors
from modellink.ckpt_convert.formats.pickle import read_archive
from modellink.ckpt_convert.formats.tensors import Part, Stored, as_bytes
from modellink.ckpt_convert.formats.writing import Planned
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.manifest import read_manifest
from modellink.ckpt_convert.rules import inverse
from modellink.ckpt_convert.source import Checkpoint, assemble, refuse_left_over, refuse_missing, refuse_shape
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import EMBEDDING, OUTPUT, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
GIGABYTE = 10 ** 9
SHARD_BYTES: int = 5 * GIGABYTE


def is_huggingface(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX))


def open_folder(folder: Path, family: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder.

    Raises:
        ModelLinkError: something is missing, damaged, or not supported; it names the file, key or tensor.
    """
    spec, family = read_spec(Config.load(folder), family)
    rules = family_of(family).rules(spec)
    found = _weights(folder, family)
    if spec.tied:
        _drop_tied_copy(found, family, spec)
    targets = inverse(spec, rules)
    try:
        refuse_missing((name for name in targets if name not in found), folder)
        refuse_left_over((name for name in found if name not in targets), folder)
    except ModelLinkError as error:
        if others := fitting(Config.load(folder), found):
            raise ModelLinkError(error.what, where=folder, fix=f"it was read as {family}; these are the weights of the family "
                                                               f"{' or '.join(others)}") from None
        raise
    known = weights(spec)
    for name, target in targets.items():
        refuse_shape(name, known[target.rows[0][0]], found[name].shape, target.shape, found[name].path)
    parts: dict[str, list[Part]] = {}
    for canonical, rows in rules.items():
        parts[canonical], row = [], 0
        for name, piece, transposed in rows:
            stored = found[name].flipped if transposed else found[name]
            parts[canonical].append(Part(stored, piece, range(stored.columns), (row, 0)))
            row += len(piece)
    described = read_manifest(folder)
    return Checkpoint("Hugging Face", folder, spec, family, folder, assemble(spec, parts, folder),
                      prompt_type=described.prompt_type if described else None)


def _weights(folder: Path, family: str) -> dict[str, Stored]:
    """The tensors of a folder under the names the family's class gives them, without its buffers."""
    told = family_of(family)
    found = {name: stored for name, stored in _stored(folder).items() if not name.endswith(told.buffers)}
    if told.prefix and not any(name.startswith(told.prefix) for name in found):  # saved from the class without a head
        found = {told.prefix + name: stored for name, stored in found.items()}
    return found


def _stored(folder: Path) -> dict[str, Stored]:
    for single, index, read in [(SINGLE, INDEX, safetensors.stored), (PICKLED, PICKLED_INDEX, pickled)]:
        if (folder / single).exists():
            return read(folder / single)
        if (folder / index).exists():
            return _sharded(folder / index, read)
    raise AssertionError(folder)


def pickled(path: Path) -> dict[str, Stored]:
    """The tensors of a `pytorch_model*.bin` by name.

    Raises:
        ModelLinkError: the file is missing, damaged or cut off, or holds something else than tensors of floating numbers.
    """
    content = read_archive(path)
    if not isinstance(content, Mapping):
        raise ModelLinkError("the file holds no tensors by name", where=path)
    found = {str(name): value for name, value in content.items() if isinstance(value, Stored)}
    for name, stored in found.items():
        if not stored.dtype.is_floating_point and not name.endswith("bias"):  # masks of old files are called so
            raise ModelLinkError(f"{name} is stored as {stored.dtype}; only floating numbers are converted", where=path,
                                 fix="quantised weights must be made whole first")
    return found


def _sharded(path: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    """The tensors of all shards that an index lists."""
    index: Any = read_json(path)
    mapped = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise ModelLinkError("the index has no weight_map", where=path)
    for file in mapped.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ModelLinkError(f"the index names {file!r}, which is not a file name of this folder", where=path,
                                 fix="do not use this checkpoint: an index must not point elsewhere")
    found: dict[str, Stored] = {}
    for file in sorted(set(mapped.values())):
        found |= read(path.parent / file)
    if ghosts := [name for name, file in mapped.items() if name not in found or found[name].path.name != file]:
        raise ModelLinkError(f"the index places {ghosts[0]} in {mapped[ghosts[0]]}, where it is not", where=path,
                             fix="the shards and the index belong to different models; copy all of them again")
    return found


def _drop_tied_copy(found: dict[str, Stored], family: str, spec: ModelSpec) -> None:
    """A tied model may carry its embedding twice; equal copies count once, others mean that it is not tied."""
    untied = ModelSpec(**spec.to_dict() | {"untie_embeddings_and_output_weights": True})
    rules = family_of(family).rules(untied)
    embedding, output = rules[EMBEDDING][0].name, rules[OUTPUT][0].name
    if output not in found or embedding not in found:
        return
    first, second = found[embedding], found[output]
    same = first.shape == second.shape and first.dtype == second.dtype
    step = max(1, (64 << 20) // max(1, first.columns))
    for start in range(0, first.shape[0] if same else 0, step):
        rows, columns = range(start, min(start + step, first.shape[0])), range(first.columns)
        same = same and as_bytes(first.read(rows, columns)) == as_bytes(second.read(rows, columns))
    if not same:
        raise ModelLinkError(f"tie_word_embeddings is true, but {output} differs from {embedding}", where=second.path,
                             fix="set tie_word_embeddings to false in config.json, or remove the tensor")
    del found[output]


def deal_shards(tensors: Mapping[str, Planned], limit: int = SHARD_BYTES) -> dict[str, dict[str, Planned]]:
    """Which file holds which tensors: shards of at most `limit` bytes (a larger tensor gets one of its own), in order."""
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
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Mapping[str, Planned]]) -> dict[str, object]:
    """The content of model.safetensors.index.json."""
    total = sum(planned.nbytes for shard in shards.values() for planned in shard.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: file for file, shard in shards.items() for name in shard}}


def config_for(spec: ModelSpec, family: str, companions: Path, dtype: str) -> dict[str, Any]:
    """The config.json to write: the one that travelled with the weights where it describes this model, else a new one.

    Raises:
        ModelLinkError: the one that travelled contradicts the model.
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
