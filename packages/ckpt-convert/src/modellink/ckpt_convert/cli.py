"""`modellink-convert`: options over `convert` and `open_checkpoint`; the original's spellings mean here what they meant there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch

from modellink.ckpt_convert.convert import WORKERS, convert, free_bytes
from modellink.ckpt_convert.formats.huggingface import GIGABYTE
from modellink.ckpt_convert.inspect import inspect, table
from modellink.ckpt_convert.open import open_checkpoint
from modellink.ckpt_convert.plan import Target, size
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.options import Layer, command, option, resolve
from modellink.kernels.parallel import ParallelLayout

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NEEDLESS_SWITCHES = ("--no-checking", "--add-qkv-bias", "--add-dense-bias")
NEEDLESS = ("--model-type", "--tokenizer-model", "--vocab-file", "--max-queue-size", "--megatron-path", "--true-vocab-size",
            *NEEDLESS_SWITCHES)
"""Options of the original that the checkpoint itself answers here; a note says so."""


@dataclass(frozen=True)
class ConvertOptions:
    to: Literal["hf", "megatron-core", "megatron-legacy", "torch_dist"] | None = option(None, "Format of the output.")
    tensor_model_parallel_size: int = option(1, "Tensor-parallel size of the output.", minimum=1,
                                             alias=("--tp", "--target-tensor-parallel-size"))
    pipeline_model_parallel_size: int = option(1, "Pipeline-parallel size of the output.", minimum=1,
                                               alias=("--pp", "--target-pipeline-parallel-size"))
    expert_model_parallel_size: int = option(
        1, "Expert-parallel size of the output.", minimum=1,
        alias=("--ep", "--target-expert-parallel-size", "--target-expert-model-parallel-size"))
    num_layer_list: tuple[int, ...] = option((), "Layers of each pipeline stage where they are uneven, e.g. 7,8,8,7.")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Layers of a model chunk where a stage holds several.", minimum=1)
    params_dtype: Literal["fp16", "bf16", "fp32"] | None = option(
        None, "Number format of the output; each tensor keeps its own where nothing is said.")
    make_vocab_size_divisible_by: int = option(1, "The vocabulary is padded to a multiple of this x TP.", minimum=1)
    moe_grouped_gemm: bool = option(False, "The experts of a rank are two tensors, as --moe-grouped-gemm of training has them.")
    dialect: Literal["megatron-core", "modellink-1.0"] = option(
        "megatron-core", "Names of the output: those of megatron-core, or the original's where they differ (latent attention, "
        "gate of shared experts).")
    model_type_hf: str | None = option(None, "Family of the model where its config.json does not say it. llama2 means, as in the "
                                             "original, whatever config.json says.")
    tokenizer_name_or_path: Path | None = option(
        None, "Hugging Face folder with config.json and tokenizer, for a Megatron checkpoint that carries none.")
    iteration: int | None = option(None, "Iteration to read; the last complete one where nothing is said.", minimum=0)
    max_shard_size: float = option(5.0, "Largest safetensors or distcp file.", unit="GB", minimum=0.000001)
    workers: int = option(WORKERS, "Threads that read and write.", minimum=1)
    overwrite: bool = option(False, "Replace the output when it exists.")
    verify: bool = option(False, "Read the output back and compare every tensor bit by bit.")
    dry_run: bool = option(False, "Say what would be written, and stop.")
    inspect: bool = option(False, "Describe SRC, and stop.")
    json: bool = option(False, "With --inspect: as JSON.")
    load_dir: Path | None = option(None, "The original's spelling of SRC.")
    save_dir: Path | None = option(None, "The original's spelling of DST. Where it is a Hugging Face folder already, that gives "
                                         "configuration and tokenizer and the output is its subfolder mg2hf.")
    load_model_type: Literal["hf", "mg"] | None = option(None, "What SRC is, Hugging Face or Megatron; it is checked.")
    save_model_type: Literal["hf", "mg"] | None = option(
        None, "The original's spelling of --to; mg is Megatron-Legacy, or with --use-mcore-models Megatron-Core.")
    use_mcore_models: bool = option(False, "With --save-model-type mg: Megatron-Core and not Megatron-Legacy.")
    save_to_legacy: bool = option(False, "With --save-model-type mg: Megatron-Legacy, though --use-mcore-models is given.")


def _note_needless(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        print(f"note: {parameter.opts[0]} is not needed here and changes nothing", file=sys.stderr)


def _needless(function: Callable[..., None]) -> Callable[..., None]:
    """Accept the original's options that the checkpoint itself answers."""
    for name in NEEDLESS:
        switch = name in NEEDLESS_SWITCHES
        function = click.option(name, hidden=True, is_flag=switch, expose_value=False, callback=_note_needless)(function)
    return function


@command(ConvertOptions, name="modellink-convert")
@click.argument("src", required=False)
@click.argument("dst", required=False)
@_needless
def modellink_convert(src: str | None, dst: str | None, given: Layer) -> None:
    """Convert the checkpoint SRC to the new folder DST.

    SRC is a Hugging Face folder, a Megatron-Core, Megatron-Legacy or torch_dist checkpoint, found out by looking.
    """
    options = resolve([ConvertOptions], given)[ConvertOptions]
    folder = _one("SRC", src, "--load-dir", options.load_dir)
    hf = options.tokenizer_name_or_path
    if options.inspect:
        facts = inspect(open_checkpoint(folder, family=options.model_type_hf, hf=hf, iteration=options.iteration))
        print(json.dumps(facts, indent=2) if options.json else table(facts))
        return
    target = _one("DST", dst, "--save-dir", options.save_dir)
    to = _target(options)
    if options.save_dir is not None and to == "hf" and (target / "config.json").is_file():
        hf, target = hf or target, target / "mg2hf"
        print(f"note: the output goes to {target}", file=sys.stderr)
    source = open_checkpoint(folder, family=options.model_type_hf, hf=hf, iteration=options.iteration)
    if options.load_model_type is not None and (options.load_model_type == "hf") != (source.format == "Hugging Face"):
        raise ModelLinkError(f"the source is a {source.format} checkpoint", where=f"{folder}, --load-model-type")
    done = convert(source, target, to=to, layout=_layout(options, source.spec.num_layers), overwrite=options.overwrite,
                   dialect=options.dialect, moe_grouped_gemm=options.moe_grouped_gemm,
                   make_vocab_size_divisible_by=options.make_vocab_size_divisible_by, verify=options.verify,
                   params_dtype=DTYPES[options.params_dtype] if options.params_dtype else None, dry_run=options.dry_run,
                   max_shard_bytes=int(options.max_shard_size * GIGABYTE), workers=options.workers)
    if options.dry_run:
        print(done.plan.describe(options.workers, free_bytes(target)))
        return
    print(f"wrote {target}: {len(done.plan.files)} files of weights, {size(done.plan.nbytes)}")
    if done.verified is not None:
        print(f"verified {done.verified} tensors, all bit-equal")


def _one(name: str, argument: str | None, flag: str, option: Path | None) -> Path:
    if argument is not None and option is not None:
        raise ModelLinkError(f"{name} is given twice", where=f"{name}, {flag}")
    if argument is None and option is None:
        raise ModelLinkError(f"{name} must be given", where="command line", fix="modellink-convert SRC DST --to FORMAT")
    return option if argument is None else Path(argument)  # type: ignore[return-value]


def _target(options: ConvertOptions) -> Target:
    if (options.to is None) == (options.save_model_type is None):
        raise ModelLinkError("the format of the output must be given once", where="--to, --save-model-type",
                             fix="--to hf or --to megatron-core")
    if options.to is not None:
        return options.to
    if options.save_model_type == "hf":
        return "hf"
    return "megatron-core" if options.use_mcore_models and not options.save_to_legacy else "megatron-legacy"


def _layout(options: ConvertOptions, num_layers: int) -> ParallelLayout:
    pp, per_chunk = options.pipeline_model_parallel_size, options.num_layers_per_virtual_pipeline_stage
    vpp = 1
    if per_chunk is not None:
        if num_layers % (pp * per_chunk):
            raise ModelLinkError(f"{num_layers} layers cannot be dealt to {pp} stages in chunks of {per_chunk}",
                                 where="--num-layers-per-virtual-pipeline-stage")
        vpp = num_layers // (pp * per_chunk)
    return ParallelLayout(tp=options.tensor_model_parallel_size, pp=pp, vpp=vpp, ep=options.expert_model_parallel_size,
                          num_layer_list=options.num_layer_list or None)


def main() -> None:
    """Entry point of `modellink-convert`."""
    run_command(lambda: modellink_convert.main(standalone_mode=False))
