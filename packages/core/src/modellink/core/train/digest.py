# SPDX-License-Identifier: Apache-2.0
"""Digests of every gradient and parameter after each iteration (`--log-digest`), which `digests.py` compares.

A digest has 64 bits; two tensors that differ in one element have different digests. Gradients are taken after data-parallel
reduction and before clipping, parameters in the precision of the model. Not here: the optimizer state, whose differences show in
the parameters of the next iteration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.ckpt_convert.weights import stage_names
from modellink.core.digests import read
from modellink.core.model.load import bare
from modellink.core.run import Run
from modellink.core.train.optimizer import whole_parameters
from modellink.core.train.training import Training
from modellink.kernels.files import atomic_write

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 1 << 20


def digest(x: Tensor) -> Tensor:
    """A 64-bit digest of the bits of x, int64 scalar on its device."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for words in x.detach().reshape(-1).view(WORDS[x.element_size()]).split(PIECE):
        odd = 2 * torch.arange(words.numel(), device=x.device) + 1  # multiplying by an odd number modulo 2^64 is invertible
        total = total * 1_000_003 + (words.long() * odd).sum()
    return total


class Digests:
    """Writes the digests of this rank if the run asks for them, starting with the next iteration."""

    def __init__(self, run: Run, training: Training) -> None:
        self.training = training
        self._file: IO[str] | None = None
        self._gradients: list[str] = []
        if (folder := run.determinism.log_digest) is not None:
            path = folder / f"rank_{dist.get_rank():05d}.jsonl"
            self._file = _continued(path, list(_names(run, training.models)), training.iteration)

    def gradients(self) -> None:
        """Record the gradients, between the backward pass and the optimizer step."""
        if self._file is not None:
            self._gradients = _hex(parameter.main_grad for _, _, parameter in _learned(self.training.models))

    def write(self, iteration: int, loss: Tensor) -> None:
        """Record the parameters after a step, and write the line of the iteration."""
        if self._file is None:
            return
        with whole_parameters(self.training.models):
            parameters = _hex(parameter for _, _, parameter in _learned(self.training.models))
        line = {"iteration": iteration, "loss": float(loss.item()).hex(), "gradients": self._gradients, "parameters": parameters}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _hex(tensors: Iterable[Tensor]) -> list[str]:
    made = [digest(tensor) for tensor in tensors]
    values = torch.stack(made).tolist() if made else []  # one synchronization with the device
    return [f"{value & (1 << 64) - 1:016x}" for value in values]


def _learned(models: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """(model chunk, name in it, parameter) of every trained parameter of this rank."""
    for chunk, model in enumerate(models):
        for name, parameter in bare(model).named_parameters():
            if parameter.requires_grad:
                yield chunk, name, parameter


def _names(run: Run, models: Sequence[Any]) -> Iterator[str]:
    """Canonical names of these parameters over all stages, chunks and ranks."""
    stage, rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    known = [stage_names(run.spec, run.layout, stage, chunk, rank) for chunk in range(len(models))]
    for chunk, name, _ in _learned(models):
        yield known[chunk].get(name, name if len(models) == 1 else f"chunk {chunk}: {name}")


def _continued(path: Path, names: list[str], resumed: int) -> IO[str]:
    """The open file, with the entries of iterations up to `resumed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = read(path)[1] if resumed and path.is_file() else {}
    with atomic_write(path, "w") as file:
        file.write(json.dumps({"names": names}) + "\n")
        file.writelines(json.dumps(entry) + "\n" for number, entry in kept.items() if number <= resumed)
    return path.open("a", encoding="utf-8")
