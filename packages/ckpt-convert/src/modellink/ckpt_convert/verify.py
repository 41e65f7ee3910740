"""Comparing two checkpoints of the same model bit by bit, whatever their formats and layouts."""

from __future__ import annotations

import torch

from modellink.ckpt_convert.blocks import cast
from modellink.ckpt_convert.formats.tensors import as_bytes
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import InternalError
from modellink.kernels.progress import Work

BLOCK = 64 << 20  # bytes compared at once


def compare(source: Checkpoint, target: Checkpoint, dtype: torch.dtype | None = None, *, show: bool = True) -> int:
    """Compare every weight of `target` with that of `source` (as `dtype`); returns how many there are.

    Raises:
        InternalError: a weight differs.
    """
    source.spec.refuse_contradiction(target.spec, str(source.folder), str(target.folder))
    known = weights(source.spec)
    with Work("verifying", len(known), unit="tensors", show=show) as work:
        for name, weight in known.items():
            step = max(1, BLOCK // max(1, source.dtype(name).itemsize * (weight.shape[1] if len(weight.shape) > 1 else 1)))
            for start in range(0, weight.shape[0], step):
                rows = [range(start, min(start + step, weight.shape[0]))]
                wanted, found = source.read(name, rows, 0), target.read(name, rows, 0)
                wanted = cast(wanted, dtype, name) if dtype else wanted
                if wanted.dtype != found.dtype or as_bytes(wanted) != as_bytes(found):
                    raise InternalError(f"{name} differs within rows {rows[0].start} to {rows[0].stop - 1}", where=target.folder)
            work.advance()
    return len(known)
