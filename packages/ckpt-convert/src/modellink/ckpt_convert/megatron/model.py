# SPDX-License-Identifier: Apache-2.0
"""Reading Megatron checkpoints of the `torch` kind, Core and Legacy: the files of all ranks as one model.

Any tensor, pipeline, virtual pipeline and expert parallel size is read; weights outside of experts are in the
folders of all expert-parallel ranks. The layout is derived from folder names and tensor shapes, not from the
arguments in the file. Only weights are read, no optimizer or random states.

Not here: folders (ranks.py), names (dialects.py, legacy.py), distributed checkpoints (distributed.py),
writing (rank_state.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.lora import LORA, A, B, sides
from modellink.ckpt_convert.megatron import dialects, ranks
from modellink.ckpt_convert.megatron.ranks import FILE, Ranks, rank_folder
from modellink.ckpt_convert.source import assemble, refuse_larger, refuse_left_over, refuse_missing, refuse_shape
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage.pickle import Inert
from modellink.ckpt_convert.storage.tensors import Assembled, Part, Stored
from modellink.ckpt_convert.weights import LAYERS, Weight, stage_names, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout, padded_vocab_size, shard_ranges

COMPARED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
            "kv_channels", "untie_embeddings_and_output_weights")
"""Arguments in the file that must match the configuration; the original's converter leaves the others at
their defaults."""


@dataclass(frozen=True)
class MegatronModel:
    """An iteration folder.

    Attributes:
        kind: a description of the format, for people.
        tensors: the canonical tensors; empty if the folder has only a LoRA adapter.
        layout: the layout they are stored in.
        adapter: the tensors of a LoRA adapter.
        arguments: Megatron's arguments of the run that saved them.
        copies: all copies of the weights that several ranks hold, the one in `tensors` first.
    """

    kind: str
    tensors: dict[str, Assembled]
    layout: ParallelLayout
    adapter: dict[str, Assembled]
    arguments: Mapping[str, Any]
    copies: dict[str, list[Assembled]] = field(default_factory=dict)


def read(folder: Path, spec: ModelSpec) -> MegatronModel:
    """Read an iteration folder.

    Raises:
        ModelLinkError: a rank is missing or damaged, or the weights do not fit `spec`.
    """
    loaded = ranks.load(folder, spec.num_layers)
    kind = dialects.kind_of(loaded.first.states[0], spec)
    arguments = _arguments(loaded.first.arguments)
    _refuse_other_model(arguments, spec, folder)
    layout = _layout(spec, loaded, folder)
    stored = [tensor for content in loaded.contents.values() for chunk in content.chunks for tensor in chunk.values()]
    if not (only_adapter := _is_adapter(loaded)):
        refuse_larger(spec, folder, numbers=sum(prod(tensor.shape) for tensor in stored))
    known = weights(spec)
    found: dict[str, list[list[Part]]] = {}
    adapter: dict[str, Assembled] = {}
    for stage, expert_rank, chunk in product(range(layout.pp), range(layout.ep), range(layout.vpp)):
        names = stage_names(spec, layout, stage, chunk, expert_rank)
        where = folder / rank_folder(layout, 0, stage, expert_rank) / FILE
        models = [dialects.split_fused(loaded.contents[stage, expert_rank, rank].chunks[chunk], spec,
                                       layout.ep, where)
                  for rank in range(layout.tp)]
        adapter |= _adapter(names, known, models, where)
        if only_adapter:  # the other tensors are copies of the base model's embedding and head
            continue
        for model in models:
            refuse_missing((name for name in names if name not in model), where)
            refuse_left_over((name for name in model if name not in names), where)
        for name, canonical in names.items():  # the embedding's stage comes before that of its tied copy
            found.setdefault(canonical, []).extend(
                copies(name, known[canonical], [model[name] for model in models]))
    if only_adapter:
        return MegatronModel(kind, {}, layout, adapter, arguments)
    tensors = assemble(spec, {name: several[0] for name, several in found.items()}, folder)
    several_of = {name: [Assembled(name, known[name].shape, tuple(parts)) for parts in several]
                  for name, several in found.items() if len(several) > 1}
    return MegatronModel(kind, tensors, layout, adapter, arguments, several_of)


def _is_adapter(loaded: Ranks) -> bool:
    """Return whether the layers have only LoRA tensors."""
    names = {name for content in loaded.contents.values() for chunk in content.chunks for name in chunk
             if name.startswith(LAYERS)}
    return bool(names) and all(LORA in name for name in names)


def _adapter(names: Mapping[str, str], known: Mapping[str, Weight], models: list[dict[str, Stored]],
             where: Path) -> dict[str, Assembled]:
    """Remove the LoRA tensors of a chunk from `models` (one for each rank), and return them assembled."""
    taken = [{name: model.pop(name) for name in list(model) if LORA in name} for model in models]
    found: dict[str, Assembled] = {}
    for name, canonical in names.items():
        module, theirs = canonical.removesuffix(".weight"), name.removesuffix(".weight")
        if theirs + A not in taken[0]:
            continue
        rank = next(iter(taken[0][theirs + A].shape), 0)
        for side, weight in zip((A, B), sides(known[canonical], rank), strict=True):
            refuse_missing((theirs + side for own in taken if theirs + side not in own), where)
            shards = [own.pop(theirs + side) for own in taken]
            found[module + side] = Assembled(module + side, weight.shape,
                                             tuple(shard_parts(theirs + side, weight, shards)))
            found[module + side].check()
    refuse_left_over((name for own in taken for name in own), where)
    return found


def _arguments(args: object) -> Mapping[str, Any]:
    return args.state if isinstance(args, Inert) and isinstance(args.state, dict) else {}


def _refuse_other_model(values: Mapping[str, Any], spec: ModelSpec, folder: Path) -> None:
    ours = spec.explicit()
    for name in COMPARED:
        theirs = values.get(name)
        if name == "num_query_groups" and not values.get("group_query_attention"):
            continue
        if theirs is not None and theirs != ours[name]:
            raise ModelLinkError(f"{name} is {theirs} in the checkpoint's arguments and {ours[name]} in the "
                                 f"configuration",
                                 where=folder, fix="the checkpoint and the configuration belong to different models")


def _layout(spec: ModelSpec, loaded: Ranks, folder: Path) -> ParallelLayout:
    """Return the layout, by counting the layers of each stage and chunk."""
    counts = []
    for stage in range(loaded.pp):
        counts.append([1 + max((int(name.split(".")[2]) for name in chunk if name.startswith(LAYERS)),
                               default=-1)
                       for chunk in loaded.contents[stage, 0, 0].chunks])
    vpp, flat = len(counts[0]), [count for stage in counts for count in stage]
    if sum(flat) != spec.num_layers or any(len(stage) != vpp for stage in counts):
        raise ModelLinkError(f"the stages have {counts} layers, the configuration has {spec.num_layers} in "
                             f"total",
                             where=folder)
    even = len(set(flat)) == 1
    layout = ParallelLayout(tp=loaded.tp, pp=loaded.pp, vpp=vpp, ep=loaded.ep,
                            num_layer_list=None if even or vpp > 1 else tuple(flat))
    layout.check_layers(spec.num_layers)
    return layout


def copies(name: str, weight: Weight, shards: list[Stored]) -> list[list[Part]]:
    """Return the parts of every copy of a weight that the tensor-parallel ranks hold; see `shard_parts`."""
    first = list(shard_parts(name, weight, shards))
    if {part.stored for part in first} != {shards[0]}:
        return [first]  # split
    return [first, *([Part(shard, range(shard.shape[0]), range(shard.columns), (0, 0))] for shard in shards[1:])]


def shard_parts(name: str, weight: Weight, shards: list[Stored]) -> Iterator[Part]:
    """Yield the positions of a weight's tensor-parallel shards in the unsharded tensor, in the order of
    ranks.

    Raises:
        ModelLinkError: the shape of a shard does not fit the model.
    """
    tp, dim, size = len(shards), weight.dim, weight.shape[weight.dim]
    if tp > 1 and weight.split in ("column", "row",
                                   "gated") and all(shard.shape == weight.shape for shard in shards):
        # the original replicated some
        yield Part(shards[0], range(weight.shape[0]), range(shards[0].columns), (0, 0))
        return
    if weight.split == "vocab":
        size = max(padded_vocab_size(size, tp), sum(shard.shape[0] for shard in shards if shard.shape))
    for rank, shard in enumerate(shards):
        pieces = shard_ranges(weight.split, size, tp, rank) if weight.split != "vocab" else [
            range(rank * (size // tp), (rank + 1) * (size // tp))]
        expected = list(weight.shape)
        expected[dim] = sum(map(len, pieces))
        refuse_shape(name, shard.shape, tuple(expected), shard.path)
        if weight.split == "replicated" and rank:
            continue
        start = 0
        for piece in pieces:
            # without the padding of a vocabulary
            inside = range(piece.start, min(piece.stop, weight.shape[dim]))
            span, at = range(start, start + len(inside)), [0, 0]
            at[dim] = piece.start
            if len(span):
                rows, columns = (range(shard.shape[0]), span) if dim else (span, range(shard.columns))
                yield Part(shard, rows, columns, (at[0], at[1]))
            start += len(piece)
