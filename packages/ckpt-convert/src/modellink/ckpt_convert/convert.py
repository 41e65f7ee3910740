# SPDX-License-Identifier: Apache-2.0
"""Converting a checkpoint: check everything, write file by file into `DST.tmp`, verify, rename.

A conversion that was killed leaves `DST.tmp` with a journal of the complete files; the same command resumes
it and ends with the same bytes. Optimizer states are not converted.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from modellink.ckpt_convert import manifest
from modellink.ckpt_convert.format import SHARD_BYTES, Format, WriteRequest
from modellink.ckpt_convert.formats import format_of, formats
from modellink.ckpt_convert.formats.huggingface import config_for
from modellink.ckpt_convert.megatron.dialects import Dialect
from modellink.ckpt_convert.open import open_checkpoint
from modellink.ckpt_convert.plan import ConversionPlan, size
from modellink.ckpt_convert.replicas import check_replicas
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage import writing
from modellink.ckpt_convert.storage.tensors import dtype_name
from modellink.ckpt_convert.verify import compare
from modellink.ckpt_convert.verify_model import check_model
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import (
    Journal,
    atomic_write,
    kill_point,
    move_into_place,
    refuse_existing,
    write_json,
)
from modellink.kernels.messages import note
from modellink.kernels.owner import owned
from modellink.kernels.parallel import ParallelLayout
from modellink.kernels.progress import Work

if TYPE_CHECKING:
    import torch

JOURNAL = "convert.journal"
CHECKSUMS = "modellink.checksums.json"  # xxh3_64 of the bytes of each tensor, by file and name
WORKERS = min(4, os.cpu_count() or 1)  # the default


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        plan: what was written, or would be with `dry_run`.
        verified: number of tensors compared, with `verify`.
        model: what `check_model` reported, with `verify_model`.
    """

    plan: ConversionPlan
    verified: int | None = None
    model: str | None = None


def convert(src: Checkpoint | Path | str, dst: Path | str, *, to: str, layout: ParallelLayout | None = None,
            dialect: Dialect = "megatron-core", moe_grouped_gemm: bool = False,
            make_vocab_size_divisible_by: int = 1, params_dtype: torch.dtype | None = None,
            overwrite: bool = False, verify: bool = False, verify_model: bool = False, dry_run: bool = False,
            family: str | None = None, hf: Path | str | None = None, iteration: int | None = None,
            max_shard_bytes: int = SHARD_BYTES, workers: int = WORKERS, allow_diverged: bool = False) -> Converted:
    """Convert the checkpoint `src`, a folder or an opened one, to the new folder `dst`.

    Args:
        to: name of a format: `hf`, `megatron-core`, `megatron-legacy`, `torch-dist`, for an adapter also
            `peft`.
        layout: tp, pp, vpp, ep and num_layer_list of the output. Default: one rank.
        dialect: names of a Megatron-Core checkpoint; `modellink-1.0` is the original's.
        moe_grouped_gemm: store all experts of a rank in two tensors, not separately.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this x tp.
        params_dtype: of the output. Default: each tensor keeps its dtype.
        overwrite: replace `dst` once the output is complete.
        verify: read the output back and compare every tensor bit by bit before it is renamed to `dst`.
        verify_model: also load it in transformers (see verify_model.py).
        dry_run: only plan.
        family, hf, iteration: see `open_checkpoint`.
        max_shard_bytes: largest safetensors or distcp file.
        workers: number of threads that read and write; each holds one block in memory.
        allow_diverged: use the first copy of weights of which the ranks hold different copies.

    Raises:
        ModelLinkError: something is wrong with the source or the target; nothing is written then.
    """
    dst = Path(dst)
    source = src if isinstance(src, Checkpoint) else open_checkpoint(src, family=family, hf=hf,
                                                                     iteration=iteration, adapter=True)
    form = format_of(to)
    layout = layout or ParallelLayout()
    _check_format(form, source, layout)
    plan = form.plan(source, WriteRequest(layout, params_dtype, dialect, moe_grouped_gemm,
                                          make_vocab_size_divisible_by, max_shard_bytes))
    dtype = dtype_name(plan.dtype)
    described = manifest.Manifest(source.family, source.spec, dtype, source.prompt_type)
    config = config_for(source.spec, source.family, source.companions, dtype)
    _check_target(source.folder, dst, overwrite)
    check_replicas(source, allow_diverged=allow_diverged)
    temporary = dst.with_name(dst.name + ".tmp")
    if dry_run:
        _check_temporary(temporary, plan)
        return Converted(plan)
    with owned(dst):
        refuse_existing(dst, overwrite=overwrite)  # another conversion may have ended meanwhile
        _check_temporary(temporary, plan)
        try:
            _write_files(plan, temporary, workers)
            form.write_companions(plan, temporary, described, config)
            count = report = None
            if verify or verify_model:
                hf = None if form.names_its_model else source.companions
                target = open_checkpoint(temporary, family=source.family, hf=hf, adapter=True)
                count = compare(source, target, params_dtype)
                report = check_model(source, target) if verify_model else None
        except ModelLinkError:  # not a kill: running it again would not help, so nothing is kept
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        kill_point("before-rename")
        (temporary / JOURNAL).unlink()
        move_into_place(temporary, dst)
    return Converted(plan, count, report)


def _check_format(form: Format, source: Checkpoint, layout: ParallelLayout) -> None:
    """Raise a ModelLinkError if the format cannot hold the source, or is not written for a layout."""
    if source.adapter is not None and not form.adapters:
        names = ", ".join(other.name for other in formats() if other.adapters)
        raise ModelLinkError("the source is a LoRA adapter", where=f"{source.folder}, --to", option="to",
                             fix=f"give the base model as the source and the adapter with --lora-load, or "
                                 f"write one of {names}")
    if source.adapter is None and not form.weights:
        raise ModelLinkError("the source is not a LoRA adapter", where=f"{source.folder}, --to", option="to",
                             fix="give an adapter, or choose another format")
    if layout != ParallelLayout() and not form.sharded:
        raise ModelLinkError(f"the format {form.name} has no parallel layout, but {layout} was requested",
                             where="--tensor-model-parallel-size, --pipeline-model-parallel-size",
                             fix="remove the parallel sizes")


def _check_target(src: Path, dst: Path, overwrite: bool) -> None:
    refuse_existing(dst, overwrite=overwrite)
    here, there = src.resolve(), dst.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise ModelLinkError("one of source and target is inside the other", where=f"{src}, {dst}",
                             fix="choose a target folder outside of the source")
    free_bytes(dst)  # refuses a target below a file


def _check_temporary(temporary: Path, plan: ConversionPlan) -> None:
    """Raise a ModelLinkError if the temporary folder is not from a conversion, or the disk is too small."""
    free = free_bytes(temporary)
    if temporary.exists() and not (temporary / JOURNAL).exists() and any(temporary.iterdir()):
        raise ModelLinkError("the temporary folder of the output exists and is not from a conversion",
                             where=temporary, fix="remove it, or choose another target")
    written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    if plan.nbytes > free + written:
        raise ModelLinkError(f"the output needs {size(plan.nbytes)}, but {size(free)} are free",
                             where=temporary.with_suffix(""))


def free_bytes(dst: Path) -> int:
    """Return the free bytes on the disk of the new folder `dst`."""
    parent = next(path for path in dst.resolve().parents if path.exists())
    if not parent.is_dir():
        raise ModelLinkError("the target is below a file", where=parent)
    return shutil.disk_usage(parent).free


def _write_files(plan: ConversionPlan, temporary: Path, workers: int) -> None:
    """Write the weight files that are not in the journal of an earlier run, and the checksums of all."""
    fingerprint = plan.fingerprint()
    done = _finished(temporary, fingerprint)
    temporary.mkdir(parents=True, exist_ok=True)
    with (Journal(temporary / JOURNAL) as journal, Work("converting", plan.nbytes, unit="bytes") as work,
          ThreadPoolExecutor(workers) as pool):
        if not journal.entries:
            journal.append({"fingerprint": fingerprint})
        sums_of = {entry["file"]: entry["xxh3_64"] for entry in journal.entries[1:]}
        lock = Lock()

        def wrote(count: int) -> None:
            with lock:
                work.advance(count)

        for number, file in enumerate(plan.files, 1):
            if file.name in done:
                wrote(file.nbytes)
                continue
            path = temporary / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as handle:
                sums = writing.write(handle.fileno(), file.layout, pool, wrote, path)
            journal.append({"file": file.name, "bytes": path.stat().st_size, "xxh3_64": sums})
            sums_of[file.name] = sums
            kill_point(f"after-file-{number}")
    write_json(temporary / CHECKSUMS, {"algorithm": "xxh3_64",
                                       "files": {file.name: sums_of[file.name] for file in plan.files}})


def _finished(temporary: Path, fingerprint: str) -> set[str]:
    """Return the files that an earlier run of the same conversion finished; everything else in `temporary` is
    removed."""
    if not (temporary / JOURNAL).exists():
        return set()
    with Journal(temporary / JOURNAL) as journal:
        entries = journal.entries
    if not entries or entries[0] != {"fingerprint": fingerprint}:
        note(f"{temporary} belongs to another conversion; starting from scratch")
        shutil.rmtree(temporary)
        return set()
    sizes = {temporary / entry["file"]: entry["bytes"] for entry in entries[1:]}
    complete = {path for path, count in sizes.items() if path.is_file() and path.stat().st_size == count}
    for path in temporary.rglob("*"):
        if path.is_file() and path not in complete and path.name != JOURNAL:
            path.unlink()
    if complete:
        note(f"resuming after {len(complete)} finished files of an earlier run")
    return {path.relative_to(temporary).as_posix() for path in complete}
