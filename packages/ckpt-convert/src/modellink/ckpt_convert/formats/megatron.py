"""Megatron-Core checkpoints of the `torch` kind: one pickle a rank, `iter_N/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`.

Read and written at any tensor, pipeline, virtual pipeline and expert-parallel size; what is not an expert is in the folders of
all expert-parallel ranks. The layout of what is read is found in folder names and tensor shapes, not believed from the
arguments in the file. Weights only: optimizer and random states stay behind.

Not here: Megatron-Legacy names, `torch_dist` (a module of its own).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from modellink.ckpt_convert.formats import pickle
from modellink.ckpt_convert.formats.archive import Planned
from modellink.ckpt_convert.formats.tensors import Assembled, Part, Stored
from modellink.ckpt_convert.source import assemble, refuse_left_over, refuse_missing, refuse_shape
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import EMBEDDING, FINAL_NORM, LAYERS, OUTPUT, Weight, stage_names, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout, held, padded_vocab_size

RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?$")
FILE = "model_optim_rng.pt"
ALIASES = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
           "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
"""Names of norms that are fused into the projection after them -> ours."""
COMPARED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "untie_embeddings_and_output_weights")
"""Arguments in the file that must agree with the configuration; the original's converter leaves others at their defaults."""


def is_megatron(folder: Path) -> bool:
    return any(RANK.match(path.name) for path in folder.glob("mp_rank_*"))


def our_name(name: str) -> str:
    """A weight's name with the norms called as they are here."""
    for theirs, ours in ALIASES.items():
        if name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    return name


def rank_folder(layout: ParallelLayout, rank: int, stage: int, expert_rank: int = 0) -> str:
    """The numbers of stage and expert rank are there only where there are several; one alone may be either."""
    stages = f"_{stage:03d}" if layout.pp > 1 else ""
    return f"mp_rank_{rank:02d}{stages}" + (f"_{expert_rank:03d}" if layout.ep > 1 else "")


@dataclass(frozen=True)
class Ranks:
    """The model chunks of every rank, by (stage, expert rank, tensor rank)."""

    tp: int
    pp: int
    ep: int
    chunks: Mapping[tuple[int, int, int], list[dict[str, Stored]]]
    arguments: Any


def read(folder: Path, spec: ModelSpec) -> tuple[dict[str, Assembled], ParallelLayout]:
    """The canonical tensors of an iteration folder, and the layout they are stored in.

    Raises:
        ModelLinkError: a rank is missing or damaged, or the weights are not those of `spec`.
    """
    ranks = _load_ranks(folder)
    _refuse_other_model(ranks.arguments, spec, folder)
    layout = _layout(spec, ranks, folder)
    known = weights(spec)
    parts: dict[str, list[Part]] = {}
    for stage, expert_rank, chunk in product(range(layout.pp), range(layout.ep), range(layout.vpp)):
        names = stage_names(spec, layout, stage, chunk, expert_rank)
        models = [ranks.chunks[stage, expert_rank, rank][chunk] for rank in range(layout.tp)]
        where = folder / rank_folder(layout, 0, stage, expert_rank) / FILE
        for model in models:
            refuse_missing((name for name in names if name not in model), where)
            refuse_left_over((name for name in model if name not in names), where)
        for name, canonical in names.items():
            if not (name == OUTPUT and canonical != OUTPUT):  # the copy of a tied embedding
                parts[canonical] = list(cut(name, known[canonical], [model[name] for model in models]))
    return assemble(spec, parts, folder), layout


def _load_ranks(folder: Path) -> Ranks:
    """Read what every rank's file holds, without its numbers."""
    paths = {(int(match[1]), match[2], match[3]): path for path in folder.iterdir() if (match := RANK.match(path.name))}
    loaded: dict[str, tuple[Any, list[dict[str, Stored]]]] = {}

    def content(path: Path) -> tuple[Any, list[dict[str, Stored]]]:
        if path.name not in loaded:
            loaded[path.name] = _load(path / FILE)
        return loaded[path.name]

    first = paths[min(paths, key=lambda key: (key[0], key[1] or "", key[2] or ""))]
    alone = all(third is None for _, _, third in paths) and _is_whole(content(first)[1])  # no stages: a number is of experts
    places = {}
    for (rank, second, third), path in paths.items():
        stage, expert_rank = (0, int(second or 0)) if alone else (int(second or 0), int(third or 0))
        places[stage, expert_rank, rank] = path
    pp, ep, tp = (max(place[axis] for place in places) + 1 for axis in range(3))
    for stage, expert_rank, rank in product(range(pp), range(ep), range(tp)):
        if (stage, expert_rank, rank) not in places:
            where = f"pipeline stage {stage}" + (f", expert-parallel rank {expert_rank}" if ep > 1 else "")
            raise ModelLinkError(
                f"tensor-parallel rank {rank} of {where} is missing", where=folder,
                fix=f"there are {len(places)} of {pp * ep * tp} folders mp_rank_*; copy the others here too")
    return Ranks(tp, pp, ep, {place: content(path)[1] for place, path in places.items()}, content(first)[0])


def _is_whole(chunks: list[dict[str, Stored]]) -> bool:
    """Whether one rank holds both ends of the model."""
    names = {name for chunk in chunks for name in chunk}
    return FINAL_NORM in names and EMBEDDING in names


def _load(path: Path) -> tuple[Any, list[dict[str, Stored]]]:
    """(arguments, the model chunks) of one rank's file."""
    content = pickle.load(path)
    if not isinstance(content, Mapping):
        raise ModelLinkError("the file holds no state of a model", where=path)
    states = [content["model"]] if "model" in content else []
    while f"model{len(states)}" in content:
        states.append(content[f"model{len(states)}"])
    if not states or not all(isinstance(state, Mapping) for state in states):
        raise ModelLinkError("the file has no entry `model` or `model0`", where=path)
    if "language_model" in states[0]:
        raise ModelLinkError("this is a Megatron-Legacy checkpoint, which is not supported yet", where=path)
    return content.get("args"), [{our_name(name): value for name, value in state.items() if isinstance(value, Stored)
                                  and not name.endswith("_extra_state")} for state in states]


def _refuse_other_model(args: object, spec: ModelSpec, folder: Path) -> None:
    values = args.state if isinstance(args, pickle.Inert) and isinstance(args.state, dict) else {}
    ours = spec.explicit()
    for name in COMPARED:
        theirs = values.get(name)
        if name == "num_query_groups" and not values.get("group_query_attention"):
            continue
        if theirs is not None and theirs != ours[name]:
            raise ModelLinkError(f"{name} is {theirs} in the checkpoint's arguments and {ours[name]} in the configuration",
                                 where=folder, fix="the checkpoint and the configuration belong to different models")


def _layout(spec: ModelSpec, ranks: Ranks, folder: Path) -> ParallelLayout:
    """Count the layers that each stage and chunk has."""
    counts = []
    for stage in range(ranks.pp):
        counts.append([1 + max((int(name.split(".")[2]) for name in chunk if name.startswith(LAYERS)), default=-1)
                       for chunk in ranks.chunks[stage, 0, 0]])
    vpp, flat = len(counts[0]), [count for stage in counts for count in stage]
    if sum(flat) != spec.num_layers or any(len(stage) != vpp for stage in counts):
        raise ModelLinkError(f"the stages have {counts} layers, the configuration says {spec.num_layers} in all",
                             where=folder)
    even = len(set(flat)) == 1
    layout = ParallelLayout(tp=ranks.tp, pp=ranks.pp, vpp=vpp, ep=ranks.ep,
                            num_layer_list=None if even or vpp > 1 else tuple(flat))
    layout.check_layers(spec.num_layers)
    return layout


def cut(name: str, weight: Weight, shards: list[Stored]) -> Iterator[Part]:
    """Where the tensor-parallel shards of a weight lie in the whole, in the order of ranks.

    Raises:
        ModelLinkError: a shard has another shape than the model gives it.
    """
    tp, dim, size = len(shards), weight.dim, weight.shape[weight.dim]
    if weight.split == "vocab":
        size = max(padded_vocab_size(size, tp), sum(shard.shape[0] for shard in shards if shard.shape))
    for rank, shard in enumerate(shards):
        pieces = held(weight.split, size, tp, rank) if weight.split != "vocab" else [
            range(rank * (size // tp), (rank + 1) * (size // tp))]
        expected = list(weight.shape)
        expected[dim] = sum(map(len, pieces))
        refuse_shape(name, weight, shard.shape, tuple(expected), shard.path)
        if weight.split == "replicated" and rank:
            continue
        start = 0
        for piece in pieces:
            inside = range(piece.start, min(piece.stop, weight.shape[dim]))  # the padding of a vocabulary is left out
            span, at = range(start, start + len(inside)), [0, 0]
            at[dim] = piece.start
            if len(span):
                rows, columns = (range(shard.shape[0]), span) if dim else (span, range(shard.columns))
                yield Part(shard, rows, columns, (at[0], at[1]))
            start += len(piece)


def rank_state(spec: ModelSpec, layout: ParallelLayout, models: list[dict[str, Planned]], *, iteration: int,
               dtype: torch.dtype, divisible_by: int) -> dict[str, Any]:
    """The content of one rank's file; `models` are its chunks."""
    state: dict[str, Any] = {"args": arguments(spec, layout, dtype=dtype, divisible_by=divisible_by, iteration=iteration),
                             "checkpoint_version": 3.0, "iteration": iteration, "num_floating_point_operations_so_far": 0}
    for chunk, model in enumerate(models):
        state["model" if layout.vpp == 1 else f"model{chunk}"] = OrderedDict(model)
    return state


def arguments(spec: ModelSpec, layout: ParallelLayout, *, dtype: torch.dtype, divisible_by: int, iteration: int) -> Namespace:
    """Megatron's arguments as its loader wants to find them in a checkpoint."""
    per_chunk = spec.num_layers // (layout.pp * layout.vpp) if layout.vpp > 1 else None
    padded = padded_vocab_size(spec.vocab_size, layout.tp, divisible_by)
    rotary = spec.position_embedding_type == "rope"
    architecture = {name: value for name, value in spec.to_dict().items() if name not in ("vocab_size", "activation_func")}
    namespace = Namespace(**architecture)
    vars(namespace).update(
        ffn_hidden_size=spec.ffn, num_query_groups=spec.groups, group_query_attention=spec.groups != spec.num_attention_heads,
        kv_channels=spec.head_dim, seq_length=spec.max_position_embeddings,
        add_position_embedding=spec.position_embedding_type == "learned_absolute", use_rotary_position_embeddings=rotary,
        use_rope_scaling=spec.rope_scaling_type == "llama3", apply_layernorm_1p=spec.layernorm_zero_centered_gamma,
        apply_query_key_layer_scaling=False, swiglu=spec.gated_linear_unit and spec.activation_func == "silu",
        add_bias_linear=spec.add_mlp_bias, make_vocab_size_divisible_by=divisible_by, padded_vocab_size=padded,
        tokenizer_type=None, use_mcore_models=True,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, context_parallel_size=1,
        expert_model_parallel_size=layout.ep, sequence_parallel=False,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=per_chunk,
        num_layer_list=",".join(map(str, layout.num_layer_list)) if layout.num_layer_list else None,
        params_dtype=dtype, fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16,
        world_size=layout.tp * layout.pp * layout.ep,
        iteration=iteration, consumed_train_samples=0, consumed_valid_samples=0)
    return namespace
