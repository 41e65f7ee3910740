# SPDX-License-Identifier: Apache-2.0
"""`modellink-convert` with its `inspect` and `diff`: reading of options; the work is done by the library."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click

from modellink.ckpt_convert.convert import WORKERS, convert, free_bytes
from modellink.ckpt_convert.formats.huggingface import HuggingFace, is_huggingface
from modellink.ckpt_convert.inspect import inspect, inspect_ranks, table
from modellink.ckpt_convert.iterations import last_complete
from modellink.ckpt_convert.lora import merge_lora
from modellink.ckpt_convert.lora_targets import check_targets
from modellink.ckpt_convert.manifest import FILE, FOLDER
from modellink.ckpt_convert.megatron.ranks import is_megatron
from modellink.ckpt_convert.open import open_adapter, open_checkpoint
from modellink.ckpt_convert.options import ConvertOptions
from modellink.ckpt_convert.plan import size
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.storage.tensors import torch_dtype
from modellink.ckpt_convert.verify import differences
from modellink.kernels.command import command
from modellink.kernels.errors import OUR_FAULT, ModelLinkError, run_command
from modellink.kernels.general_options import NOTHING_DONE, DryRun
from modellink.kernels.messages import note
from modellink.kernels.model_options import ModelPathOptions
from modellink.kernels.options import Layer, option, resolve
from modellink.kernels.original import original_flags, translate

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
GIGABYTE = 10 ** 9


@dataclass(frozen=True)
class InspectOptions(ModelPathOptions):
    iteration: int | None = option(None, "Iteration to read. Default: the last complete one.", minimum=0,
                                   alias="--ckpt-step")
    json: bool = option(False, "Print JSON.")


@command(InspectOptions, name="inspect", example="modellink-convert inspect ./qwen-mcore", starts=True)
@click.argument("path")
def inspect_command(path: str, given: Layer) -> None:
    """Describe the checkpoint PATH: format, layout, model, tensors, sizes."""
    options = resolve([InspectOptions], given)[InspectOptions]
    _describe(Path(path), options.model_type_hf, options.tokenizer_name_or_path, options.iteration,
              options.json)


def _describe(path: Path, family: str | None, hf: Path | None, iteration: int | None, as_json: bool) -> None:
    folder = path
    known = hf is not None or (path / FILE).exists() or (path / FOLDER).exists() or (path.parent / FILE).exists()
    if not known and any(path.glob("iter_*")):
        folder = last_complete(path, iteration)
    if not known and path.is_dir() and is_megatron(folder):
        facts = inspect_ranks(folder)
    else:
        facts = inspect(open_checkpoint(path, family=family, hf=hf, iteration=iteration, adapter=True))
    print(json.dumps(facts, indent=2) if as_json else table(facts))


@command(ModelPathOptions, name="diff", example="modellink-convert diff ./Qwen2.5-7B ./qwen-mcore", starts=True)
@click.argument("first")
@click.argument("second")
def diff_command(first: str, second: str, given: Layer) -> None:
    """Compare two checkpoints of any formats and layouts tensor by tensor; exit with status 1 if they differ."""
    options = resolve([ModelPathOptions], given)[ModelPathOptions]
    one, other = (open_checkpoint(path, family=options.model_type_hf, hf=options.tokenizer_name_or_path,
                                  adapter=True)
                  for path in (first, second))
    count = 0
    for field, (mine, theirs) in one.spec.differences(other.spec).items():
        print(f"{field}: {mine} and {theirs}")
        count += 1
    for difference in differences(one, other):
        print(difference)
        count += 1
    if count:
        sys.exit(OUR_FAULT)
    print(f"{len(one.tensors)} tensors, all bit-equal")


@command(ConvertOptions, name="modellink-convert", subcommands={"inspect": inspect_command, "diff": diff_command},
         example="modellink-convert ./Qwen2.5-7B ./qwen-mcore --to megatron-core --tp 2 --pp 2", starts=True)
@click.argument("src", required=False)
@click.argument("dst", required=False)
def modellink_convert(src: str | None, dst: str | None, given: Layer, dry_run: DryRun | None) -> None:
    """Convert the checkpoint SRC to the new folder DST.

    SRC is a Hugging Face folder, a Megatron-Core, Megatron-Legacy or torch-dist checkpoint; its format is
    detected. Command lines of the original's convert_ckpt.py work too.
    """
    options = resolve([ConvertOptions], given)[ConvertOptions]
    folder = _one("SRC", src, "--load-dir", options.load_dir)
    hf = options.tokenizer_name_or_path
    if options.inspect:
        _describe(folder, options.model_type_hf, hf, options.iteration, options.json)
        return
    target = _one("DST", dst, "--save-dir", options.save_dir)
    to = options.target()
    if options.save_dir is not None and to == "hf" and (target / "config.json").is_file():
        hf, target = hf or target, target / "mg2hf"
        note(f"the output is {target}")
    _check_source(folder, options)
    source = _opened(folder, hf, options)
    if options.true_vocab_size not in (None, source.spec.vocab_size):
        raise ModelLinkError(f"the vocabulary size of the model is {source.spec.vocab_size}",
                             where="--true-vocab-size")
    layout = options.output_layout(source.spec.num_layers)
    if dry_run:
        dry_run.check_devices(layout)
    workers = options.workers or WORKERS
    dtype = torch_dtype(DTYPES[options.params_dtype]) if options.params_dtype else None
    done = convert(source, target, to=to, layout=layout,
                   overwrite=options.overwrite, dialect=options.names(),
                   moe_grouped_gemm=options.moe_grouped_gemm,
                   make_vocab_size_divisible_by=options.make_vocab_size_divisible_by, verify=options.verify,
                   verify_model=options.verify and options.verify_model, params_dtype=dtype,
                   dry_run=dry_run is not None, max_shard_bytes=int(options.max_shard_size * GIGABYTE),
                   workers=workers, allow_diverged=options.allow_diverged == "first")
    if dry_run:
        print(done.plan.describe(workers, free_bytes(target)))
        print(NOTHING_DONE)
        return
    print(f"wrote {target}: {len(done.plan.files)} files, {size(done.plan.nbytes)} of weights")
    if done.verified is not None:
        print(f"verified {done.verified} tensors, all bit-equal")
    if done.model is not None:
        print(done.model)


def _opened(folder: Path, hf: Path | None, options: ConvertOptions) -> Checkpoint:
    """Open the source, and merge the adapter of --lora-load into it."""
    r, alpha = options.lora_r, options.lora_alpha
    if options.lora_load is None:
        return open_checkpoint(folder, family=options.model_type_hf, hf=hf, iteration=options.iteration,
                               lora_r=r, lora_alpha=alpha, adapter=True)
    source = open_checkpoint(folder, family=options.model_type_hf, hf=hf, iteration=options.iteration)
    if source.merged:
        raise ModelLinkError("the source already has an adapter, which is merged",
                             where=f"{folder}, --lora-load", fix="remove --lora-load")
    adapter = open_adapter(options.lora_load, source, r=r, alpha=alpha)
    check_targets(adapter.tensors, options.targets)
    assert adapter.adapter is not None
    merged = merge_lora(source, adapter.adapter, adapter.tensors)
    return replace(merged, prompt_type=adapter.prompt_type or source.prompt_type)


def _check_source(folder: Path, options: ConvertOptions) -> None:
    """Raise a ModelLinkError if the source is not what --load-model-type claims."""
    if options.load_model_type is None or not folder.is_dir():
        return
    found = is_huggingface(folder)
    if (options.load_model_type == "hf") != found:
        what = f"a {HuggingFace.title}" if found else "not a Hugging Face"
        raise ModelLinkError(f"the source is {what} checkpoint", where=f"{folder}, --load-model-type")


def _one(name: str, argument: str | None, flag: str, option: Path | None) -> Path:
    if argument is not None and option is not None:
        raise ModelLinkError(f"{name} is given twice", where=f"{name}, {flag}")
    if argument is None and option is None:
        raise ModelLinkError(f"{name} is required", where="command line",
                             fix="modellink-convert SRC DST --to FORMAT")
    return option if argument is None else Path(argument)  # type: ignore[return-value]


def give_memory_back() -> None:
    """Make glibc return freed blocks of 4 MB and more to the system, and keep 16 MB of smaller ones per
    thread.

    Otherwise it keeps large blocks for each thread, and the system clears the pages of every small one again.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(TRIM_THRESHOLD, 16 << 20)


def main() -> None:
    """Entry point of `modellink-convert`."""
    give_memory_back()
    run_command(_run)


def _run() -> None:
    words = sys.argv[1:]
    if words[:1] not in [[name] for name in modellink_convert.subcommands]:
        words = translate(words, original_flags("modellink.ckpt_convert"))
    modellink_convert.main(words, standalone_mode=False)
