# SPDX-License-Identifier: Apache-2.0
"""The folders of a Megatron checkpoint, `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`: one file per rank.

TT is the tensor-parallel rank, PPP the pipeline stage, EEE the expert-parallel rank; the last two are present
only if there are several. Not here: the names of the tensors in a file (dialects.py) and how they form a
model (model.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.megatron import legacy
from modellink.ckpt_convert.megatron.dialects import renamed
from modellink.ckpt_convert.storage.pickle import read_archive
from modellink.ckpt_convert.storage.tensors import Stored
from modellink.ckpt_convert.weights import EMBEDDING, FINAL_NORM, LAYERS
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?$")
FILE = "model_optim_rng.pt"


def is_megatron(folder: Path) -> bool:
    return any(RANK.match(path.name) for path in folder.glob("mp_rank_*"))


def rank_folder(layout: ParallelLayout, rank: int, stage: int, expert_rank: int = 0) -> str:
    """Return the name of a rank's folder; stage and expert rank are part of it only if there are several."""
    stages = f"_{stage:03d}" if layout.pp > 1 else ""
    return f"mp_rank_{rank:02d}{stages}" + (f"_{expert_rank:03d}" if layout.ep > 1 else "")


@dataclass(frozen=True)
class Content:
    """The content of one rank's file: Megatron's arguments, the states of its model chunks, their tensors
    under our names."""

    arguments: Any
    states: list[Mapping[str, Any]]
    chunks: list[dict[str, Stored]]


@dataclass(frozen=True)
class Ranks:
    """The files of all ranks, by (stage, expert rank, tensor rank)."""

    tp: int
    pp: int
    ep: int
    contents: Mapping[tuple[int, int, int], Content]

    @property
    def first(self) -> Content:
        return self.contents[0, 0, 0]


def load(folder: Path, num_layers: int | None = None) -> Ranks:
    """Read the files of all ranks, without the tensors' data.

    Args:
        num_layers: of the model, if it is known.

    Raises:
        ModelLinkError: a rank is missing or damaged.
    """
    paths = {(int(match[1]), match[2], match[3]): path for path in folder.iterdir()
             if (match := RANK.match(path.name))}
    first = paths[min(paths, key=lambda key: (key[0], key[1] or "", key[2] or ""))]
    loaded = {first: _content(first / FILE)}
    # without stages the second number counts expert ranks
    no_stages = all(third is None for _, _, third in paths) and _is_complete(loaded[first].chunks, num_layers)
    places = {}
    for (rank, second, third), path in paths.items():
        stage, expert_rank = (0, int(second or 0)) if no_stages else (int(second or 0), int(third or 0))
        places[stage, expert_rank, rank] = path
    pp, ep, tp = (max(place[axis] for place in places) + 1 for axis in range(3))
    for stage, expert_rank, rank in product(range(pp), range(ep), range(tp)):
        if (stage, expert_rank, rank) not in places:
            where = f"pipeline stage {stage}" + (f", expert-parallel rank {expert_rank}" if ep > 1 else "")
            raise ModelLinkError(
                f"tensor-parallel rank {rank} of {where} is missing", where=folder,
                fix=f"there are {len(places)} of {pp * ep * tp} folders mp_rank_*; copy the missing ones")
    return Ranks(tp, pp, ep, {place: loaded.get(path) or _content(path / FILE)
                              for place, path in places.items()})


def _is_complete(chunks: list[dict[str, Stored]], num_layers: int | None) -> bool:
    """Return whether one rank holds both ends of the model, or (of an adapter) its last layer."""
    names = {name for chunk in chunks for name in chunk}
    last = f"{LAYERS}{(num_layers or 0) - 1}."
    return {FINAL_NORM, EMBEDDING} <= names or any(name.startswith(last) for name in names)


def _content(path: Path) -> Content:
    content = read_archive(path)
    if not isinstance(content, Mapping):
        raise ModelLinkError("the file has no model state", where=path)
    if isinstance(version := content.get("checkpoint_version"), (int, float)) and version < 2:
        raise ModelLinkError(f"the checkpoint has version {version}, in which queries, keys and values have "
                             f"another order",
                             where=path, fix="load and save it once with a newer Megatron-LM")
    states = [content["model"]] if "model" in content else []
    while f"model{len(states)}" in content:
        states.append(content[f"model{len(states)}"])
    if not states or not all(isinstance(state, Mapping) for state in states):
        raise ModelLinkError("the file has no entry `model` or `model0`", where=path)
    if any(legacy.is_legacy(state) and not isinstance(state[legacy.ROOT], Mapping) for state in states):
        raise ModelLinkError(f"the entry `{legacy.ROOT}` of the file is not a mapping", where=path)
    return Content(content.get("args"), states, [renamed(state) for state in states])
