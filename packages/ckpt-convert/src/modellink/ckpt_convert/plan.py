# SPDX-License-Identifier: Apache-2.0
"""`ConversionPlan`: every file that a conversion will write, every tensor in it with dtype and shape, and how
each is read.

A plan is made from names and shapes only, so that all errors are found before anything is written. Not here:
the plans of each format (formats/), and writing (convert.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modellink.ckpt_convert import blocks
from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.manifest import companion_files
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage.tensors import dtype_name
from modellink.ckpt_convert.storage.writing import FileLayout, Planned
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

PROGRAM_BYTES = 250 << 20  # resident size of Python with torch before any weight is read
LATER_FIELDS = ("latent_norm_epsilon", "layer_windows", "layer_rotary_bases")
"""Fields of ModelSpec added after 0.1.0; without a value they do not count in a fingerprint."""
FIRST_NAMES = {"torch-dist": "torch_dist"}
"""Names of formats in the fingerprints of 0.1.0."""


@dataclass(frozen=True)
class PlannedFile:
    """A file of weights: its name below the target folder and its content."""

    name: str
    layout: FileLayout

    @property
    def tensors(self) -> tuple[Planned, ...]:
        return tuple(slot.planned for slot in self.layout.slots)

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.tensors)


@dataclass(frozen=True)
class ConversionPlan:
    """All files of a conversion.

    Attributes:
        to: name of the format; `title` is for people.
        layout: of the output.
        dtype: in which most weights are written.
        json_files: name -> content of the JSON files next to the weights (an index, the configuration of an
            adapter).
        iteration: in which the weights are written, if the format has iterations.
    """

    source: Checkpoint
    to: str
    title: str
    layout: ParallelLayout
    dtype: torch.dtype
    files: tuple[PlannedFile, ...]
    json_files: Mapping[str, Any] = field(default_factory=dict)
    iteration: int = 1

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def peak_bytes(self, workers: int) -> int:
        """Estimate the peak memory in bytes: the program, and per worker a block as read, as cast and as
        written."""
        transposed = any(tensor.transposed for tensor in self.source.tensors.values())
        block = blocks.TRANSPOSED_BYTES if transposed else blocks.BLOCK_BYTES
        largest = max(planned.nbytes for file in self.files for planned in file.tensors)
        return PROGRAM_BYTES + workers * 3 * min(block, largest)

    def fingerprint(self) -> str:
        """Return a hash that changes if the source files or the output change.

        It is the one of 0.1.0, so that an interrupted conversion can be resumed by a newer version.
        """
        return hashlib.sha256(json.dumps(self._identity()).encode()).hexdigest()

    def _identity(self) -> list[Any]:
        inputs = [*self.source.files(), *companion_files(self.source.companions)]
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
        output = [(file.name, [(str(planned.dtype), planned.shape) for planned in file.tensors])
                  for file in self.files]
        spec = {name: value for name, value in self.source.spec.to_dict().items()
                if value is not None or name not in LATER_FIELDS}
        index = next(iter(self.json_files.values()), None)
        adapters = [_as_first_written(self.source.adapter), _as_first_written(self.source.merged)]
        return [FIRST_NAMES.get(self.to, self.to), repr(self.layout), adapters, spec, stats, output, index]

    def describe(self, workers: int, free: int) -> str:
        """Return the plan as text for people; `free` bytes are available on the disk."""
        lines = [f"from  {self.source.folder}: {self.source.describe()}",
                 f"to    {self.title}, {self.layout}, {dtype_name(self.dtype)}"]
        lines += [f"  {file.name}  {len(file.tensors)} tensors, {size(file.nbytes)}" for file in self.files]
        count = sum(len(file.tensors) for file in self.files)
        lines.append(f"{len(self.files)} files, {count} tensors, {self.nbytes:,} bytes "
                     f"({size(self.nbytes)}); "
                     f"{size(free)} free on the disk; peak memory about {size(self.peak_bytes(workers))}")
        return "\n".join(lines)


def _as_first_written(config: AdapterConfig | None) -> str:
    return repr(config).replace("AdapterConfig", "LoraConfig")


def size(count: int) -> str:
    """Return a number of bytes for people."""
    for unit, scale in [("GB", 10 ** 9), ("MB", 10 ** 6), ("kB", 10 ** 3)]:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
