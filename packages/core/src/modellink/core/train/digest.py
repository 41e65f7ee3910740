"""Digests of a run (`--log-digest`): one of every gradient and parameter after each iteration, for `digests.py` to compare.

A digest is 64 bits; two tensors that differ in a single element have different ones. Gradients are those that data parallelism
has summed, before they are clipped. Parameters are as the model computes with them. Not here: the optimizer's state, whose
difference shows in the next iteration's parameters.
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
from modellink.kernels.files import atomic_write

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 1 << 20


def digest(x: Tensor) -> Tensor:
    """64 bits of the bits of x, as a tensor on its device."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for words in x.detach().reshape(-1).view(WORDS[x.element_size()]).split(PIECE):
        odd = 2 * torch.arange(words.numel(), device=x.device) + 1  # an odd factor loses nothing of what it multiplies
        total = total * 1_000_003 + (words.long() * odd).sum()
    return total


class Digests:
    """Writes those of this rank, where the run asks for them; `resumed` is the iteration it goes on from."""

    def __init__(self, run: Run, models: Sequence[Any], resumed: int) -> None:
        self.models = models
        self._file: IO[str] | None = None
        self._learned: list[Any] = []
        self._gradients: list[str] = []
        if (folder := run.determinism.log_digest) is not None:
            found = list(_learned(run, models))
            self._learned = [parameter for _, parameter in found]
            self._file = _continued(folder / f"rank_{dist.get_rank():05d}.jsonl", [name for name, _ in found], resumed)

    def gradients(self) -> None:
        """Note the gradients, between backward and the optimizer's step."""
        if self._file is not None:
            self._gradients = _hex(parameter.main_grad for parameter in self._learned)

    def write(self, iteration: int, loss: Tensor) -> None:
        """Note the parameters after a step, and write the line of the iteration."""
        if self._file is None:
            return
        with whole_parameters(self.models):
            parameters = _hex(self._learned)
        line = {"iteration": iteration, "loss": loss.item().hex(), "gradients": self._gradients, "parameters": parameters}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _hex(tensors: Iterable[Tensor]) -> list[str]:
    made = [digest(tensor) for tensor in tensors]
    values = torch.stack(made).tolist() if made else []  # one wait for the device
    return [f"{value & (1 << 64) - 1:016x}" for value in values]


def _learned(run: Run, models: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Names over all stages, chunks and ranks, and the parameters this rank learns."""
    stage, rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    for chunk, model in enumerate(models):
        canonical = stage_names(run.spec, run.layout, stage, chunk, rank)
        for name, parameter in bare(model).named_parameters():
            if parameter.requires_grad:
                yield canonical.get(name, name if len(models) == 1 else f"chunk {chunk}: {name}"), parameter


def _continued(path: Path, names: list[str], resumed: int) -> IO[str]:
    """The file, with what it holds of iterations up to `resumed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = read(path)[1] if resumed and path.is_file() else {}
    with atomic_write(path, "w") as file:
        file.write(json.dumps({"names": names}) + "\n")
        file.writelines(json.dumps(entry) + "\n" for number, entry in kept.items() if number <= resumed)
    return path.open("a", encoding="utf-8")
