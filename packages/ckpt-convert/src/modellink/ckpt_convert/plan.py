"""What a conversion will write: every file, every tensor in it with dtype and shape, and how each is read.

A plan is made from names and shapes alone, so that everything that can be wrong is found before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, product
from typing import IO, Literal

import torch

from modellink.ckpt_convert import rules
from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.formats import archive, huggingface, megatron, safetensors
from modellink.ckpt_convert.formats.archive import Planned
from modellink.ckpt_convert.iterations import iteration_folder
from modellink.ckpt_convert.manifest import companion_files
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.weights import read_shard, stage_names, weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout, held, padded_vocab_size

Target = Literal["hf", "megatron-core"]
PROGRAM_BYTES = 250 << 20  # resident size of Python with torch before any weight is read


@dataclass(frozen=True)
class File:
    """One file of weights. `write(file, wrote)` writes it; `wrote` is told the bytes of each tensor."""

    name: str
    tensors: tuple[Planned, ...]
    write: Callable[[IO[bytes], Callable[[int], None]], None]

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
    index: dict[str, object] | None = None
    iteration: int = 1

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def peak_bytes(self) -> int:
        """Estimate of the memory at most in use: the program, and the largest tensor once as read and once as written."""
        return PROGRAM_BYTES + 2 * max(planned.nbytes for file in self.files for planned in file.tensors)

    def fingerprint(self) -> str:
        """Changes when the source files or anything about the output changes."""
        inputs = [*self.source.files(), *companion_files(self.source.companions)]
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
        output = [(file.name, [(str(planned.dtype), planned.shape) for planned in file.tensors]) for file in self.files]
        everything = [self.to, repr(self.layout), self.source.spec.to_dict(), stats, output, self.index]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def describe(self) -> str:
        """The plan as lines for people."""
        lines = [f"from  {self.source.folder}: {self.source.describe()}",
                 f"to    {'Hugging Face' if self.to == 'hf' else 'Megatron-Core'}, {self.layout}, "
                 f"{str(self.dtype).removeprefix('torch.')}"]
        lines += [f"  {file.name}  {len(file.tensors)} tensors, {size(file.nbytes)}" for file in self.files]
        lines.append(f"{len(self.files)} files, {size(self.nbytes)}; peak memory about {size(self.peak_bytes)}")
        return "\n".join(lines)


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit, scale in [("GB", 10 ** 9), ("MB", 10 ** 6), ("kB", 10 ** 3)]:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` as `dtype`.

    Raises:
        ModelLinkError: a finite value becomes infinite.
    """
    made = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and bool((made.isinf() & ~tensor.isinf()).any()):
        raise ModelLinkError(f"{name} has values too large for {dtype}", where="--params-dtype", fix="use bf16 or fp32")
    return made


def plan_huggingface(source: Checkpoint, *, dtype: torch.dtype | None = None,
                     shard_bytes: int = huggingface.SHARD_BYTES) -> Plan:
    """A Hugging Face folder from any source."""
    targets = rules.inverse(source.spec, family_of(source.family).rules(source.spec))

    def planned(name: str, target: rules.Target) -> Planned:
        groups = [(canonical, [piece for _, piece in group])
                  for canonical, group in groupby(target.rows, key=lambda entry: entry[0])]
        kind = dtype or source.dtype(groups[0][0])

        def fetch() -> torch.Tensor:
            parts = [source.read(canonical, pieces, 0) for canonical, pieces in groups]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            return cast(whole.T.contiguous() if target.transposed else whole, kind, name)

        return Planned(kind, target.shape, fetch)

    tensors = {name: planned(name, target) for name, target in targets.items()}
    shards = huggingface.deal_shards(tensors, shard_bytes)

    def file(name: str, shard: dict[str, Planned]) -> File:
        return File(name, tuple(shard.values()), lambda handle, wrote: safetensors.save(handle, shard, wrote))

    index = huggingface.index_of(shards) if len(shards) > 1 else None
    return Plan(source, "hf", ParallelLayout(), dtype or source.main_dtype, tuple(file(*item) for item in shards.items()), index)


def plan_megatron(source: Checkpoint, layout: ParallelLayout, *, divisible_by: int = 1,
                  dtype: torch.dtype | None = None) -> Plan:
    """A Megatron-Core checkpoint from any source.

    Raises:
        ModelLinkError: the layout does not divide the model.
    """
    spec, known = source.spec, weights(source.spec)
    spec.check_layout(layout)
    iteration = source.iteration or 1  # a model that was never trained counts as 1, as in the original
    main = dtype or source.main_dtype

    def planned(name: str, rank: int) -> Planned:
        weight, kind = known[name], dtype or source.dtype(name)
        shape = list(weight.shape)
        full = padded_vocab_size(shape[0], layout.tp, divisible_by) if weight.split == "vocab" else shape[weight.dim]
        shape[weight.dim] = sum(map(len, held(weight.split, full, layout.tp, rank)))

        def fetch() -> torch.Tensor:
            shard = read_shard(source, name, weight, tp=layout.tp, rank=rank, divisible_by=divisible_by)
            return cast(shard, kind, name)

        return Planned(kind, tuple(shape), fetch)

    def file(stage: int, rank: int, expert_rank: int) -> File:
        models = [{ours: planned(name, rank) for ours, name in stage_names(spec, layout, stage, chunk, expert_rank).items()}
                  for chunk in range(layout.vpp)]
        state = megatron.rank_state(spec, layout, models, iteration=iteration, dtype=main, divisible_by=divisible_by)
        name = f"{iteration_folder(iteration)}/{megatron.rank_folder(layout, rank, stage, expert_rank)}/{megatron.FILE}"
        return File(name, tuple(planned for model in models for planned in model.values()),
                    lambda handle, wrote: archive.save(handle, state, wrote))

    files = tuple(file(*place) for place in product(range(layout.pp), range(layout.tp), range(layout.ep)))
    return Plan(source, "megatron-core", layout, main, files, iteration=iteration)
