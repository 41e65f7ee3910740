# SPDX-License-Identifier: Apache-2.0
"""A conversion holds a few blocks of tensors per worker, not whole tensors: the bytes of all tensors alive are counted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_folder, spec_of

from modellink.ckpt_convert import blocks, convert, verify
from modellink.ckpt_convert.storage.tensors import Assembled
from modellink.kernels.parallel import ParallelLayout

BLOCK = 4096
WORKERS = 2
LIMIT = 6 * BLOCK


class Alive:
    """Bytes of the tensors that reading and casting returned and that are not freed yet."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.RLock()

    def _add(self, count: int) -> None:
        with self._lock:
            self.now += count
            self.peak = max(self.peak, self.now)

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self._add(tensor.nbytes)
        weakref.finalize(tensor, self._add, -tensor.nbytes)
        return tensor


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    counter, read, cast = Alive(), Assembled.read, blocks.cast

    def counted_read(self: Assembled, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        return counter.count(read(self, pieces, dim, across))

    def counted_cast(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        made = cast(tensor, *arguments)
        return made if made is tensor else counter.count(made)

    monkeypatch.setattr(Assembled, "read", counted_read)
    monkeypatch.setattr(blocks, "cast", counted_cast)
    monkeypatch.setattr(verify, "BLOCK", BLOCK)
    return counter


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose embedding and head have 131 x 500 bf16 numbers each, many blocks."""
    make_folder(tmp_path / "hf", *spec_of("llama", hidden_size=500))
    return tmp_path / "hf"


@pytest.mark.parametrize(("target", "layout"), [
    ("megatron-core", ParallelLayout(tp=2)), ("megatron-legacy", ParallelLayout(tp=2)), ("torch-dist", ParallelLayout()),
    ("hf", ParallelLayout())], ids=["megatron-core", "megatron-legacy", "torch-dist", "hf"])
def test_blocks_and_not_tensors_are_held(target: str, layout: ParallelLayout, alive: Alive, source: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    convert(source, tmp_path / "out", to=target, layout=layout, params_dtype=torch.float32, workers=WORKERS, verify=True)
    back = {"params_dtype": torch.bfloat16, "workers": WORKERS, "verify": True}
    convert(tmp_path / "out", tmp_path / "back", to="hf", **back)
    # per worker a block as read and as cast; a comparison holds a block, the same cast to twice the width, and the other's
    assert BLOCK <= alive.peak <= LIMIT
    assert alive.now == 0


def test_the_count_sees_whole_tensors(alive: Alive, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks as large as a tensor the count is over the limit of the test above."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 30)
    convert(source, tmp_path / "out", to="hf", params_dtype=torch.float32, workers=1)
    assert alive.peak >= 131 * 500 * (2 + 4) > LIMIT
