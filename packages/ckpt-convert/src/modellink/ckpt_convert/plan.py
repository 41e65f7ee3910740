"""What a conversion will write: every file, every tensor in it with dtype and shape, and how each is read.

A plan is made from names and shapes alone, so that everything that can be wrong is found before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, Literal

import torch

from modellink.ckpt_convert import blocks, lora, peft, rules
from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.formats import archive, huggingface, rank_state, ranks, safetensors, torch_dist_state
from modellink.ckpt_convert.formats.peft import WEIGHTS
from modellink.ckpt_convert.formats.rank_state import Style
from modellink.ckpt_convert.formats.writing import FileLayout, Planned
from modellink.ckpt_convert.iterations import iteration_folder
from modellink.ckpt_convert.manifest import companion_files
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.weights import stage_names, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

Target = Literal["hf", "megatron-core", "megatron-legacy", "torch_dist", "peft"]
TARGETS: dict[Target, str] = {"hf": "Hugging Face", "megatron-core": "Megatron-Core", "megatron-legacy": "Megatron-Legacy",
                              "torch_dist": "torch_dist", "peft": "peft adapter"}
PROGRAM_BYTES = 250 << 20  # resident size of Python with torch before any weight is read


@dataclass(frozen=True)
class File:
    """One file of weights: its name below the target and everything that will be in it."""

    name: str
    layout: FileLayout

    @property
    def tensors(self) -> tuple[Planned, ...]:
        return tuple(slot.planned for slot in self.layout.slots)

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.tensors)


@dataclass(frozen=True)
class Plan:
    """All files of a conversion; `dtype` is the one most weights are written in."""

    source: Checkpoint
    to: Target
    layout: ParallelLayout
    dtype: torch.dtype
    files: tuple[File, ...]
    index: dict[str, Any] | None = None  # the file beside those of weights: of shards, or a peft adapter's configuration
    iteration: int = 1

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def peak_bytes(self, workers: int) -> int:
        """Estimate of the memory at most in use: the program, and for each worker a block as read, as cast and as written."""
        crossed = any(tensor.transposed for tensor in self.source.tensors.values())
        block = blocks.CROSSED_BYTES if crossed else blocks.BLOCK_BYTES
        largest = max(planned.nbytes for file in self.files for planned in file.tensors)
        return PROGRAM_BYTES + workers * 3 * min(block, largest)

    def fingerprint(self) -> str:
        """Changes when the source files or anything about the output changes."""
        inputs = [*self.source.files(), *companion_files(self.source.companions)]
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
        output = [(file.name, [(str(planned.dtype), planned.shape) for planned in file.tensors]) for file in self.files]
        loras = [repr(self.source.adapter), repr(self.source.merged)]
        everything = [self.to, repr(self.layout), loras, self.source.spec.to_dict(), stats, output, self.index]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def describe(self, workers: int, free: int) -> str:
        """The plan as lines for people; `free` bytes are there for it."""
        lines = [f"from  {self.source.folder}: {self.source.describe()}",
                 f"to    {TARGETS[self.to]}, {self.layout}, "
                 f"{str(self.dtype).removeprefix('torch.')}"]
        lines += [f"  {file.name}  {len(file.tensors)} tensors, {size(file.nbytes)}" for file in self.files]
        count = sum(len(file.tensors) for file in self.files)
        lines.append(f"{len(self.files)} files, {count} tensors, {self.nbytes:,} bytes ({size(self.nbytes)}); "
                     f"{size(free)} of the disk are free; peak memory about {size(self.peak_bytes(workers))}")
        return "\n".join(lines)


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit, scale in [("GB", 10 ** 9), ("MB", 10 ** 6), ("kB", 10 ** 3)]:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def plan_huggingface(source: Checkpoint, *, dtype: torch.dtype | None = None,
                     shard_bytes: int = huggingface.SHARD_BYTES) -> Plan:
    """A Hugging Face folder from any source."""
    targets = rules.inverse(source.spec, family_of(source.family).rules(source.spec))

    def planned(name: str, target: rules.Target) -> Planned:
        groups = [(canonical, [piece for _, piece in group])
                  for canonical, group in groupby(target.rows, key=lambda entry: entry[0])]
        kind = dtype or source.dtype(groups[0][0])

        def rows() -> Iterator[torch.Tensor]:
            for canonical, pieces in groups:
                yield from blocks.rows_of(source, canonical, pieces, 0, kind)

        if not target.transposed:
            return Planned(kind, target.shape, rows)
        return blocks.transposed(Planned(kind, target.shape[::-1], rows))

    tensors = {name: planned(name, target) for name, target in targets.items()}
    shards = huggingface.deal_shards(tensors, shard_bytes)

    def file(name: str, shard: dict[str, Planned]) -> File:
        return File(name, safetensors.layout(shard))

    index = huggingface.index_of(shards) if len(shards) > 1 else None
    return Plan(source, "hf", ParallelLayout(), dtype or source.main_dtype, tuple(file(*item) for item in shards.items()), index)


def plan_megatron(source: Checkpoint, layout: ParallelLayout, style: Style, *, dtype: torch.dtype | None = None) -> Plan:
    """A Megatron checkpoint of the `torch` kind from any source.

    Raises:
        ModelLinkError: the layout does not divide the model, or Megatron-Legacy cannot hold it.
    """
    spec, adapter = source.spec, source.adapter
    known = lora.adapter_weights(spec, source.shapes, source.folder) if adapter else weights(spec)
    if adapter and style.dialect == "modellink-1.0" and spec.multi_head_latent_attention:
        raise ModelLinkError("adapters of latent attention have no names in the original's dialect", where="--dialect",
                             fix="use megatron-core")
    spec.check_layout(layout)
    iteration = source.iteration or 1  # a model that was never trained counts as 1, as in the original
    main = dtype or source.main_dtype

    def planned(name: str, rank: int) -> Planned:
        return blocks.shard(source, name, known[name], dtype or source.dtype(name), tp=layout.tp, rank=rank,
                            divisible_by=style.divisible_by)

    def file(stage: int, rank: int, expert_rank: int) -> File:
        names = [stage_names(spec, layout, stage, chunk, expert_rank, names=known if adapter else None)
                 for chunk in range(layout.vpp)]
        models = [{lora.on_disk(ours): planned(name, rank) for ours, name in own.items()} for own in names]
        state = rank_state.rank_state(spec, layout, models, style, iteration=iteration, dtype=main, adapter=adapter)
        name = f"{iteration_folder(iteration)}/{ranks.rank_folder(layout, rank, stage, expert_rank)}/{ranks.FILE}"
        return File(name, archive.layout(state))

    files = tuple(file(*place) for place in product(range(layout.pp), range(layout.tp), range(layout.ep)))
    return Plan(source, "megatron-legacy" if style.legacy else "megatron-core", layout, main, files, iteration=iteration)


def plan_peft(source: Checkpoint, *, dtype: torch.dtype | None = None) -> Plan:
    """An adapter folder of peft from an adapter."""
    assert source.adapter is not None
    layout, config = peft.planned(source.spec, source.family, source.tensors, source.adapter, base=str(source.companions),
                                  dtype=dtype)
    return Plan(source, "peft", ParallelLayout(), dtype or source.main_dtype, (File(WEIGHTS, layout),), config)


def plan_torch_dist(source: Checkpoint, *, dtype: torch.dtype | None = None,
                    shard_bytes: int = huggingface.SHARD_BYTES) -> Plan:
    """A distributed checkpoint, which has no layout, from any source."""
    spec, main, iteration = source.spec, dtype or source.main_dtype, source.iteration or 1
    tensors = {name: blocks.shard(source, name, weight, dtype or source.dtype(name), tp=1, rank=0)
               for name, weight in weights(spec).items()}
    arguments = rank_state.arguments(spec, ParallelLayout(), Style(), dtype=main, iteration=iteration)
    made = torch_dist_state.files(tensors, spec, arguments, iteration=iteration, shard_bytes=shard_bytes)
    files = tuple(File(f"{iteration_folder(iteration)}/{name}", layout) for name, layout in made.items())
    return Plan(source, "torch_dist", ParallelLayout(), main, files, iteration=iteration)
