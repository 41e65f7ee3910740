# SPDX-License-Identifier: Apache-2.0
"""The content of a tensor to be written, as blocks of rows: each is read, cast and passed on before the next.

A block has at most `BLOCK_BYTES` of the target, so memory does not grow with a model or its vocabulary. If
rows of the target are columns of the source (GPT-2's matrices, grouped experts), blocks are larger or the
full tensor, because each of them reads all of the source. Not here: which rows (rules.py, weights.py), and
writing (storage/writing.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage.writing import Planned
from modellink.ckpt_convert.weights import Weight, shard_pieces
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 2 << 20  # small enough to stay in the cache from the read to the write
TRANSPOSED_BYTES = 256 << 20  # of a block whose rows are columns of the source


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return `tensor` as `dtype`; `name` is for the error.

    Raises:
        ModelLinkError: a finite value becomes infinite.
    """
    import torch

    made = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and _overflows(tensor, made):
        raise ModelLinkError(f"{name} has values too large for {dtype}", where="--params-dtype",
                             fix="use bf16 or fp32")
    return made


def _overflows(tensor: torch.Tensor, made: torch.Tensor) -> bool:
    """Return whether a finite value became infinite; the extremes tell without another copy, unless one is
    NaN."""
    import torch

    if not tensor.numel():
        return False
    extremes = torch.stack(torch.aminmax(tensor)).double()
    if extremes.isfinite().all():
        return bool(torch.stack(torch.aminmax(made)).isinf().any())
    return bool((made.isinf() & ~tensor.isinf()).any())


def batches(pieces: Sequence[range], limit: int) -> Iterator[list[range]]:
    """Yield the same ranges, split and grouped into batches of `limit` numbers; the last batch may have
    fewer."""
    batch: list[range] = []
    count = 0
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + limit - count)
            batch.append(range(start, stop))
            count += stop - start
            start = stop
            if count == limit:
                yield batch
                batch, count = [], 0
    if batch:
        yield batch


def rows_of(source: Checkpoint, name: str, pieces: Sequence[range], dim: int,
            dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield index ranges along `dim` of a canonical tensor as blocks of rows."""
    shape = source.tensors[name].shape
    columns = prod(shape[1:]) if dim == 0 else sum(map(len, pieces))
    most = TRANSPOSED_BYTES if source.tensors[name].transposed else BLOCK_BYTES
    limit = max(1, most // max(1, columns * max(dtype.itemsize, source.tensors[name].itemsize)))
    for batch in batches(pieces if dim == 0 else [range(shape[0])], limit):
        if dim == 0:
            yield cast(source.read(name, batch, 0), dtype, name)
        else:
            yield cast(source.read(name, pieces, 1, batch[0]), dtype, name)


def shard(source: Checkpoint, name: str, weight: Weight, dtype: torch.dtype, *, tp: int, rank: int,
          divisible_by: int = 1) -> Planned:
    """Return the part of a canonical tensor that a tensor-parallel rank holds."""
    pieces = shard_pieces(weight, tp=tp, rank=rank, divisible_by=divisible_by)
    shape = list(weight.shape)
    shape[weight.dim] = sum(map(len, pieces))
    return Planned(dtype, tuple(shape), lambda: rows_of(source, name, pieces, weight.dim, dtype))


def joined(parts: Sequence[Planned], shape: tuple[int, ...]) -> Planned:
    """Return tensors concatenated along their rows, as one of the given shape."""
    def blocks() -> Iterator[torch.Tensor]:
        for part in parts:
            yield from part.blocks()
    return Planned(parts[0].dtype, shape, blocks)


def transposed(planned: Planned) -> Planned:
    """Return the transpose of a matrix, as a single block."""
    def blocks() -> Iterator[torch.Tensor]:
        yield planned.made().T.contiguous()
    return Planned(planned.dtype, planned.shape[::-1], blocks)

