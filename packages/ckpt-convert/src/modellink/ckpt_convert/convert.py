"""The conversion itself: check everything, write file by file into `DST.tmp`, verify, rename.

A run that was killed leaves `DST.tmp` with a journal of the files that are whole; the same command goes on from there and ends
with the same bytes. Optimizer states are not converted.
"""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from modellink.ckpt_convert import manifest
from modellink.ckpt_convert.formats import huggingface, peft, writing
from modellink.ckpt_convert.formats.dialects import Dialect
from modellink.ckpt_convert.formats.huggingface import SHARD_BYTES
from modellink.ckpt_convert.formats.rank_state import Style
from modellink.ckpt_convert.iterations import TRACKER, iteration_folder
from modellink.ckpt_convert.open import open_checkpoint
from modellink.ckpt_convert.plan import Plan, Target, plan_huggingface, plan_megatron, plan_peft, plan_torch_dist, size
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.verify import compare
from modellink.ckpt_convert.verify_model import check_model
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import (
    Journal,
    atomic_write,
    kill_point,
    mark_complete,
    move_into_place,
    refuse_existing,
    write_json,
)
from modellink.kernels.parallel import ParallelLayout
from modellink.kernels.progress import Work

JOURNAL = "convert.journal"
CHECKSUMS = "modellink.checksums.json"  # xxh3_64 of the bytes of each tensor, by file and name
WORKERS = min(4, os.cpu_count() or 1)  # where nothing is said


@dataclass(frozen=True)
class Converted:
    """What a conversion did, or with `dry_run` would do; `verified` counts the tensors compared, `model` says
    what transformers made of it."""

    plan: Plan
    verified: int | None = None
    model: str | None = None


def convert(src: Checkpoint | Path | str, dst: Path | str, *, to: Target, layout: ParallelLayout | None = None,
            dialect: Dialect = "megatron-core", moe_grouped_gemm: bool = False, make_vocab_size_divisible_by: int = 1,
            params_dtype: torch.dtype | None = None, overwrite: bool = False, verify: bool = False, verify_model: bool = False,
            dry_run: bool = False,
            family: str | None = None, hf: Path | str | None = None, iteration: int | None = None,
            max_shard_bytes: int = SHARD_BYTES, workers: int = WORKERS) -> Converted:
    """Convert the checkpoint `src`, a folder or an opened one, to the new folder `dst`.

    Args:
        to: `hf`, `megatron-core`, `megatron-legacy`, `torch_dist`, or of an adapter `peft`.
        layout: tp, pp, vpp, ep and num_layer_list of the output; one rank where nothing is said.
        dialect: of Megatron-Core's names; `modellink-1.0` is the original's.
        moe_grouped_gemm: the experts of a rank are two tensors, not several each.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this x tp.
        params_dtype: of the output; each tensor keeps its own where nothing is said.
        overwrite: replace `dst`, once the new one is whole.
        verify: read the output back and compare every tensor bit by bit before it appears as `dst`.
        verify_model: then have transformers build it too (see verify_model.py).
        dry_run: only plan.
        family, hf, iteration: see `open_checkpoint`.
        max_shard_bytes: of one safetensors or distcp file.
        workers: threads that read and write; each holds one block in memory.

    Raises:
        ModelLinkError: anything wrong with the input or the output's place; nothing is written then.
    """
    dst = Path(dst)
    source = src if isinstance(src, Checkpoint) else open_checkpoint(src, family=family, hf=hf, iteration=iteration, adapter=True)
    if (source.adapter is not None and to in ("hf", "torch_dist")) or (source.adapter is None and to == "peft"):
        what = "a LoRA adapter" if source.adapter else "no LoRA adapter"
        raise ModelLinkError(f"the source is {what}", where=f"{source.folder}, --to", fix=(
            "give the base model as the source and this with --lora-load, or write peft, megatron-core or megatron-legacy"
            if source.adapter else "give an adapter, or another format"))
    layout = layout or ParallelLayout()
    if to in ("hf", "torch_dist", "peft"):
        if layout != ParallelLayout():
            raise ModelLinkError(f"the format {to} is not cut over ranks, {layout} was asked for",
                                 where="--tensor-model-parallel-size, --pipeline-model-parallel-size")
        plan = plan_peft(source, dtype=params_dtype) if to == "peft" else (
            plan_huggingface if to == "hf" else plan_torch_dist)(source, dtype=params_dtype, shard_bytes=max_shard_bytes)
    else:
        style = Style(to == "megatron-legacy", dialect, moe_grouped_gemm, make_vocab_size_divisible_by)
        plan = plan_megatron(source, layout, style, dtype=params_dtype)
    dtype = str(plan.dtype).removeprefix("torch.")
    config = huggingface.config_for(source.spec, source.family, source.companions, dtype)
    _check_place(source.folder, dst, plan, overwrite)
    if dry_run:
        return Converted(plan)

    temporary = dst.with_name(dst.name + ".tmp")
    try:
        _write_files(plan, temporary, workers)
        _write_companions(plan, temporary, config, dtype)
        count = model = None
        if verify or verify_model:
            hf = source.companions if to == "peft" else None
            target = open_checkpoint(temporary, family=source.family, hf=hf, adapter=True)
            count = compare(source, target, params_dtype)
            model = check_model(source, target) if verify_model else None
    except ModelLinkError:  # not a kill: running it again would not help, so nothing is kept
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    kill_point("before-rename")
    (temporary / JOURNAL).unlink()
    move_into_place(temporary, dst)
    return Converted(plan, count, model)


def _check_place(src: Path, dst: Path, plan: Plan, overwrite: bool) -> None:
    refuse_existing(dst, overwrite=overwrite)
    here, there = src.resolve(), dst.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise ModelLinkError("the output and the source lie inside each other", where=f"{src}, {dst}",
                             fix="choose a folder beside it")
    free = free_bytes(dst)
    temporary = dst.with_name(dst.name + ".tmp")
    if temporary.exists() and not (temporary / JOURNAL).exists() and any(temporary.iterdir()):
        raise ModelLinkError("a folder with the temporary name of the output exists and is not a conversion of ours",
                             where=temporary, fix="remove it, or choose another output")
    there_already = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    if plan.nbytes > free + there_already:
        raise ModelLinkError(f"the output needs {size(plan.nbytes)}, {size(free)} are free", where=dst)


def free_bytes(dst: Path) -> int:
    """What the disk has room for where `dst` is to be."""
    parent = next(path for path in dst.resolve().parents if path.exists())
    if not parent.is_dir():
        raise ModelLinkError("the output lies below a file", where=parent)
    return shutil.disk_usage(parent).free


def _write_files(plan: Plan, temporary: Path, workers: int) -> None:
    """Write the files of weights that the journal of an earlier run does not have, and the checksums of all."""
    fingerprint = plan.fingerprint()
    done = _finished(temporary, fingerprint)
    temporary.mkdir(parents=True, exist_ok=True)
    with (Journal(temporary / JOURNAL) as journal, Work("converting", plan.nbytes, unit="bytes") as work,
          ThreadPoolExecutor(workers) as pool):
        if not journal.entries:
            journal.append({"fingerprint": fingerprint})
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
            kill_point(f"after-file-{number}")
        sums_of = {entry["file"]: entry["xxh3_64"] for entry in journal.entries[1:]}
    write_json(temporary / CHECKSUMS, {"algorithm": "xxh3_64", "files": {file.name: sums_of[file.name] for file in plan.files}})


def _finished(temporary: Path, fingerprint: str) -> set[str]:
    """The files an earlier run of the same conversion finished; whatever else lies in `temporary` is removed."""
    if not (temporary / JOURNAL).exists():
        return set()
    with Journal(temporary / JOURNAL) as journal:
        entries = journal.entries
    if not entries or entries[0] != {"fingerprint": fingerprint}:
        print(f"note: {temporary} belongs to another conversion; starting anew", file=sys.stderr)
        shutil.rmtree(temporary)
        return set()
    sizes = {temporary / entry["file"]: entry["bytes"] for entry in entries[1:]}
    whole = {path for path, count in sizes.items() if path.is_file() and path.stat().st_size == count}
    for path in temporary.rglob("*"):
        if path.is_file() and path not in whole and path.name != JOURNAL:
            path.unlink()
    if whole:
        print(f"note: going on after {len(whole)} finished files of an earlier run", file=sys.stderr)
    return {path.relative_to(temporary).as_posix() for path in whole}


def _write_companions(plan: Plan, temporary: Path, config: dict[str, object], dtype: str) -> None:
    """Everything that is not weights."""
    if plan.to == "peft":
        write_json(temporary / peft.CONFIG, plan.index)
        return
    if plan.to == "hf":
        for path in manifest.companion_files(plan.source.companions):
            manifest.copy_file(path, temporary / path.name)
        write_json(temporary / "config.json", config)
        if plan.index is not None:
            write_json(temporary / huggingface.INDEX, plan.index)
        if plan.source.prompt_type is not None:  # all else is in config.json
            manifest.write_manifest(temporary, _described(plan.source, dtype))
        return
    manifest.write_companions(temporary, _described(plan.source, dtype), plan.source.companions)
    write_json(temporary / manifest.FOLDER / "config.json", config)
    mark_complete(temporary / iteration_folder(plan.iteration))
    with atomic_write(temporary / TRACKER, "w") as file:
        file.write(str(plan.iteration))


def _described(source: Checkpoint, dtype: str) -> manifest.Manifest:
    return manifest.Manifest(source.family, source.spec, dtype, source.prompt_type)
