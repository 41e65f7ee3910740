# SPDX-License-Identifier: Apache-2.0
"""A conversion without files: tensors one by one, for a program that has a place for them.

`iter_hf_tensors` yields the full tensors of a checkpoint of any format under Hugging Face names;
`iter_megatron_shards` yields what each rank of a layout holds. Only the tensor that is yielded is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.ckpt_convert import blocks
from modellink.ckpt_convert.formats.huggingface import plan_huggingface
from modellink.ckpt_convert.open import open_checkpoint
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.weights import stage_names, weights
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shard:
    """A tensor of one rank.

    `name` is Megatron-Core's name in the model chunk (layers and experts numbered from 0), `canonical` the
    name in the model.
    """

    stage: int
    chunk: int
    tp_rank: int
    expert_rank: int
    name: str
    canonical: str
    tensor: torch.Tensor


def iter_hf_tensors(path: Checkpoint | Path | str, *, dtype: torch.dtype | None = None,
                    family: str | None = None,
                    hf: Path | str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Return an iterator over (Hugging Face name, tensor) of all weights, in the order of the forward pass.

    Args:
        path: a folder, or an opened checkpoint, of any format and layout.
        dtype: of the tensors. Default: each keeps its dtype.
        family, hf: see `open_checkpoint`.

    Raises:
        ModelLinkError: see `open_checkpoint`; raised before the first tensor.
    """
    source = path if isinstance(path, Checkpoint) else open_checkpoint(path, family=family, hf=hf)
    plan = plan_huggingface(source, dtype=dtype)
    return ((slot.name, slot.planned.made()) for file in plan.files for slot in file.layout.slots)


def iter_megatron_shards(path: Checkpoint | Path | str, layout: ParallelLayout, *,
                         dtype: torch.dtype | None = None, make_vocab_size_divisible_by: int = 1,
                         family: str | None = None, hf: Path | str | None = None) -> Iterator[Shard]:
    """Return an iterator over the tensors of every rank, by stage, then expert rank, then tensor rank.

    Args:
        path: a folder, or an opened checkpoint, of any format and layout.
        layout: tp, pp, vpp, ep and num_layer_list of the ranks.
        dtype: of the tensors. Default: each keeps its dtype.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this x tp.
        family, hf: see `open_checkpoint`.

    Raises:
        ModelLinkError: see `open_checkpoint`, or the layout does not divide the model; raised before the
            first shard.
    """
    source = path if isinstance(path, Checkpoint) else open_checkpoint(path, family=family, hf=hf)
    source.spec.check_layout(layout)
    return _shards(source, layout, dtype, make_vocab_size_divisible_by)


def _shards(source: Checkpoint, layout: ParallelLayout, dtype: torch.dtype | None,
            divisible_by: int) -> Iterator[Shard]:
    known = weights(source.spec)
    for stage, expert_rank, rank, chunk in product(*map(range,
                                                        (layout.pp, layout.ep, layout.tp, layout.vpp))):
        for name, canonical in stage_names(source.spec, layout, stage, chunk, expert_rank).items():
            planned = blocks.shard(source, canonical, known[canonical], dtype or source.dtype(canonical),
                                   tp=layout.tp, rank=rank, divisible_by=divisible_by)
            yield Shard(stage, chunk, rank, expert_rank, name, canonical, planned.made())
