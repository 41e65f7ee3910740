# SPDX-License-Identifier: Apache-2.0
"""How a model is split across ranks: the layers of a pipeline stage, the rows of a rank, the experts of a
rank.

Core uses it to build and load a model, the converter to split and merge checkpoints. Pure Python: a row map
is a list of ranges over the rows (or columns) of the unsharded tensor, in the order in which the rank holds
them.

Not here: process groups (megatron-core makes them) and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from modellink.kernels.errors import ModelLinkError

Split = Literal["replicated", "column", "row", "gated", "vocab"]
"""How tensor parallelism splits a matrix [out, in]: replicated; by rows; by columns; by rows of each half
(gate, up) separately; by rows of the padded vocabulary."""


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions.

    Attributes:
        vpp: number of model chunks of a pipeline stage (1: no interleaving).
        num_layer_list: number of layers of each stage, if they differ; excludes `vpp` > 1.
        ulysses: of the `cp` ranks of a sequence, so many exchange heads for tokens; such groups pass keys and
            values around a ring (1: ring attention, cp: no ring).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    num_layer_list: tuple[int, ...] | None = None
    ulysses: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        sizes = [("TP", self.tp), ("PP", self.pp), ("VPP", self.vpp), ("CP", self.cp), ("EP", self.ep),
                 ("DP", self.dp)]
        return " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one rank"

    def check_layers(self, num_layers: int) -> None:
        """Raise a ModelLinkError if `num_layers` cannot be assigned to the stages."""
        if self.num_layer_list is not None:
            if self.vpp > 1:
                raise ModelLinkError("--num-layer-list and virtual pipeline stages exclude each other",
                                     where="--num-layer-list, --num-layers-per-virtual-pipeline-stage")
            if len(self.num_layer_list) != self.pp or sum(self.num_layer_list) != num_layers or min(self.num_layer_list) < 1:
                raise ModelLinkError(
                    f"the layer list {','.join(map(str, self.num_layer_list))} has "
                    f"{len(self.num_layer_list)} stages with "
                    f"{sum(self.num_layer_list)} layers; there are {self.pp} stages and {num_layers} layers",
                    where="--num-layer-list")
        elif num_layers % (self.pp * self.vpp):
            even = [size for size in range(1, num_layers + 1) if num_layers % (size * self.vpp) == 0]
            raise ModelLinkError(
                f"{num_layers} layers cannot be split evenly into {self.pp} pipeline stages"
                + (f" of {self.vpp} chunks" if self.vpp > 1 else ""),
                where="--pipeline-model-parallel-size",
                fix=f"use {_choices(even)} stages, or give the layers of each stage with --num-layer-list")

    def layers(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """Return the global numbers (from 0) of the layers of chunk `chunk` of stage `stage`."""
        self.check_layers(num_layers)
        if self.num_layer_list is not None:
            start = sum(self.num_layer_list[:stage])
            return range(start, start + self.num_layer_list[stage])
        count = num_layers // (self.pp * self.vpp)
        start = (chunk * self.pp + stage) * count
        return range(start, start + count)

    def experts(self, num_experts: int, rank: int) -> range:
        """Return the global numbers (from 0) of the experts of expert-parallel rank `rank`."""
        if num_experts % self.ep:
            raise ModelLinkError(f"{num_experts} experts cannot be split evenly across {self.ep} ranks",
                                 where="--expert-model-parallel-size",
                                 fix=f"use {_choices(divisors(num_experts))}")
        count = num_experts // self.ep
        return range(rank * count, (rank + 1) * count)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _choices(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:-1])) + (" or " if len(sizes) > 1 else "") + str(sizes[-1])


def check_tensor_parallel(tp: int, *, num_attention_heads: int, num_query_groups: int,
                          ffn_hidden_sizes: Sequence[int]) -> None:
    """Raise a ModelLinkError if `tp` does not divide the query groups or a feed-forward hidden size; it names
    what works."""
    works = [size for size in divisors(num_query_groups)
             if all(width % size == 0 for width in ffn_hidden_sizes)]
    if num_query_groups % tp:
        raise ModelLinkError(
            f"tensor parallel size {tp} does not divide the {num_query_groups} query groups "
            f"(of {num_attention_heads} attention heads)",
            where="--tensor-model-parallel-size", fix=f"use {_choices(works)}")
    for width in ffn_hidden_sizes:
        if width % tp:
            raise ModelLinkError(f"tensor parallel size {tp} does not divide the feed-forward hidden size "
                                 f"{width}",
                                 where="--tensor-model-parallel-size", fix=f"use {_choices(works)}")


def padded_vocab_size(vocab_size: int, tp: int, divisible_by: int = 1) -> int:
    """Return the vocabulary size rounded up to a multiple of `divisible_by` x `tp`."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def shard_ranges(split: Split, size: int, tp: int, rank: int) -> list[range]:
    """Return the ranges of the `size` rows (columns if `split` is `row`) of a tensor that tensor-parallel
    rank `rank` holds.

    Raises:
        ModelLinkError: `size` (for `gated`, half of it) is not divisible by `tp`.
    """
    if split == "replicated":
        return [range(size)]
    parts = 2 if split == "gated" else 1
    part = size // parts
    if size % parts or part % tp:
        raise ModelLinkError(f"{part} rows cannot be split evenly across {tp} tensor-parallel ranks",
                             where="--tensor-model-parallel-size", fix=f"use {_choices(divisors(part))}")
    count = part // tp
    return [range(p * part + rank * count, p * part + (rank + 1) * count) for p in range(parts)]


def query_key_value_rows(num_attention_heads: int, num_query_groups: int,
                         head_dim: int) -> list[tuple[str, range]]:
    """Return the rows of Megatron's fused QKV matrix in order: group by group, its queries, its key, its
    value.

    Each entry is (`q`, `k` or `v`, rows of that projection). Splitting the rows evenly never splits a group.
    """
    per_group = num_attention_heads // num_query_groups * head_dim
    rows = []
    for group in range(num_query_groups):
        rows.append(("q", range(group * per_group, (group + 1) * per_group)))
        rows += [(name, range(group * head_dim, (group + 1) * head_dim)) for name in "kv"]
    return rows
