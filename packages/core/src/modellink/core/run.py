"""A run, checked: everything the commands decide before any process starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path

from modellink.ckpt_convert import open_checkpoint
from modellink.ckpt_convert.families import NO_FORM, family_names, family_of
from modellink.ckpt_convert.formats.peft import is_peft
from modellink.ckpt_convert.iterations import FOLDER, last_complete
from modellink.ckpt_convert.manifest import Manifest
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core import __version__
from modellink.core.config import (
    CheckpointConfig,
    DataConfig,
    InstructionConfig,
    LoggingConfig,
    LoraConfig,
    MemoryConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
)
from modellink.core.posttrain import adapters
from modellink.core.train import rank_files
from modellink.core.train.progress import read_progress
from modellink.kernels.device import Device, find
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, fields_of, resolve
from modellink.kernels.parallel import ParallelLayout

CONFIGS = (ParallelConfig, DataConfig, InstructionConfig, LoraConfig, OptimizerConfig, MoEConfig, MemoryConfig,
           CheckpointConfig, LoggingConfig)


@dataclass(frozen=True)
class Run:
    """One training run. `source` is the opened --load; `resumed` the iteration's folder when it is a run to go on with."""

    spec: ModelSpec
    parallel: ParallelConfig
    data: DataConfig
    instruction: InstructionConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    moe: MoEConfig
    memory: MemoryConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    layout: ParallelLayout
    device: Device
    source: Checkpoint | None = None
    resumed: Path | None = None

    @property
    def manifest(self) -> Manifest:
        """What the checkpoints of this run say of themselves."""
        family = self.source.family if self.source else self.checkpoint.model_type_hf
        assert family is not None  # checked before the run was made
        prompt_type = self.instruction.prompt_type or (self.source.prompt_type if self.source else None)
        return Manifest(family, self.spec, str(self.optimizer.dtype).removeprefix("torch."), prompt_type,
                        f"modellink-core {__version__}")

    @property
    def sequence_multiple(self) -> int:
        """What the length of a sequence must be a multiple of to be cut over ranks."""
        return (2 * self.layout.cp if self.layout.cp > 1 else 1) * (self.layout.tp if self.parallel.sequence_parallel else 1)

    @property
    def companions(self) -> Path | None:
        """Where the config and tokenizer files lie that travel with its checkpoints."""
        return self.source.companions if self.source else self.checkpoint.tokenizer_name_or_path


def prepare(layers: list[Layer], world_size: int | None, local_rank: int = 0) -> Run:
    """Settle and check a run; starts nothing and writes nothing.

    Args:
        layers: what was said, in rising precedence.
        world_size: how many processes there are; None where they are still to be started.

    Raises:
        ModelLinkError: anything a user could have got wrong.
    """
    model_names = {field.name for field in fields_of(ModelSpec)}
    model_layers = [Layer(layer.source, {name: value for name, value in layer.values.items() if name in model_names})
                    for layer in layers]
    other_layers = [Layer(layer.source, {name: value for name, value in layer.values.items() if name not in model_names})
                    for layer in layers]
    resolved = resolve(CONFIGS, *other_layers)
    parallel, data, checkpoint = resolved[ParallelConfig], resolved[DataConfig], resolved[CheckpointConfig]
    lora = resolved[LoraConfig]
    source, resumed = _open(checkpoint, parallel, lora, by_samples=resolved[OptimizerConfig].by_samples)
    spec = _spec(source, model_layers)
    layout = parallel.layout(spec.num_layers, world_size or parallel.processes())
    spec.check_layout(layout)
    resolved[MemoryConfig].check_layers(layout, spec.num_layers)
    resolved[MemoryConfig].check_precision(resolved[OptimizerConfig].dtype)
    _check(spec, layout, parallel, data, resolved[OptimizerConfig])
    adapters.targets(spec, lora)
    _check_experts(spec, resolved[MoEConfig], lora)
    optimizer = resolved[OptimizerConfig]
    if optimizer.train_samples is not None:
        optimizer = replace(optimizer, train_iters=data.iterations_of(optimizer.train_samples, layout.dp))
    _check_instruction(spec, data, resolved[InstructionConfig], resolved[MoEConfig])
    if source is None and checkpoint.save is not None:
        _check_family(checkpoint)
    if not data.is_instruction_dataset and (data.separates_documents or data.eod_mask_loss):
        data = replace(data, eod_token_id=_end_of_document(data, source.companions if source else None, spec.vocab_size))
    run = Run(spec, parallel, data, resolved[InstructionConfig], lora, optimizer, resolved[MoEConfig],
              resolved[MemoryConfig], checkpoint, resolved[LoggingConfig], layout, find(parallel.device, local_rank), source,
              resumed)
    if checkpoint.save_format != "torch-dist":
        _check_save_format(run)
    return run


def _check_save_format(run: Run) -> None:
    form = run.checkpoint.save_format
    if run.lora.on:
        raise ModelLinkError(f"adapters alone are saved, and {form} files would hold the whole model",
                             where="--save-format, --lora-target-modules",
                             fix="leave it out, and merge or convert SAVE/iter_N/peft with modellink-convert")
    rank_files.plan(form, run.manifest, run.layout, run.parallel.make_vocab_size_divisible_by)


def _open(config: CheckpointConfig, parallel: ParallelConfig, lora: LoraConfig, *,
          by_samples: bool) -> tuple[Checkpoint | None, Path | None]:
    """The opened --load, and the iteration's folder where it (with adapters: --lora-load) holds a run to go on with."""
    if config.load is None:
        if lora.on:
            raise ModelLinkError("adapters learn what to add to weights, and there are none", where="--lora-target-modules",
                                 fix="give a checkpoint with --load")
        return None, None
    if (config.load / adapters.FILE).is_file():
        raise ModelLinkError("the checkpoint holds adapters alone", where=f"--load {config.load}",
                             fix="give it with --lora-load, and with --load what they were trained on")
    source = open_checkpoint(config.load, family=config.model_type_hf, hf=config.tokenizer_name_or_path,
                             iteration=None if lora.on and lora.lora_load else config.ckpt_step)
    if lora.lora_load is not None:
        adapters.check(lora.lora_load, lora, source)
    if config.ckpt_step is not None and lora.lora_load is not None and is_peft(lora.lora_load):
        raise ModelLinkError("the adapters are a folder of peft, which has no iterations", where="--ckpt-step, --lora-load")
    if lora.on:
        continued = None if lora.lora_load is None or is_peft(lora.lora_load) else lora.lora_load
    else:
        continued = None if source.iteration is None else config.load
    if continued is None or config.finetune:
        return source, None
    _check_step(config, continued)
    folder = last_complete(continued, config.ckpt_step)
    progress = read_progress(folder)
    if progress is None:
        return source, None
    if config.load_optim and progress.distributed_optimizer != parallel.use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if progress.distributed_optimizer else "--no-use-distributed-optimizer"
        raise ModelLinkError("the distributed optimizer keeps its state in another form than the plain one, and the checkpoint "
                             f"was saved with {flag}", where=folder,
                             fix=f"continue with {flag}, which works at any layout, or take only the weights with --finetune")
    if progress.by_samples != by_samples:
        unit = "samples" if progress.by_samples else "iters"
        raise ModelLinkError(f"the run that is continued is counted by --train-{unit}", where=f"{folder}, --train-iters, "
                             "--train-samples", fix=f"give --train-{unit}, or take only the weights with --finetune")
    return source, folder


def _check_step(config: CheckpointConfig, continued: Path) -> None:
    """Going on from an earlier iteration in its own folder would leave two runs there, and the next start take the wrong one."""
    later = [path.name for path in continued.glob("iter_*") if (match := FOLDER.match(path.name))
             and config.ckpt_step is not None and int(match[1]) > config.ckpt_step]
    if later and config.save is not None and config.save.resolve() == continued.resolve():
        raise ModelLinkError(f"the folder to save in holds {max(later)}, which is later than iteration {config.ckpt_step}",
                             where=f"--ckpt-step, --save {config.save}", fix="save elsewhere, or move the later ones away")


def _spec(source: Checkpoint | None, layers: list[Layer]) -> ModelSpec:
    """The architecture: of the checkpoint, which options may repeat but not contradict; else of the options."""
    if source is None:
        return resolve([ModelSpec], *layers)[ModelSpec]
    known = source.spec.explicit()
    for layer in layers:
        for field in fields_of(ModelSpec):
            if layer.values.get(field.name) is None or field.name == "max_position_embeddings":
                continue
            value, theirs = field.convert(layer.values[field.name], layer.source), known[field.name]
            if value != theirs and not (isinstance(value, float) and isclose(value, theirs or 0.0, rel_tol=1e-6)):
                raise ModelLinkError(f"{field.flag} is {value} in {layer.source} and {theirs} in the checkpoint",
                                     where=f"{layer.source}, {source.folder}",
                                     fix="leave it out: the checkpoint says what it is" if layer.source == "command line" else
                                     "the checkpoint is of another model")
    return source.spec


def _check(spec: ModelSpec, layout: ParallelLayout, parallel: ParallelConfig, data: DataConfig,
           optimizer: OptimizerConfig) -> None:
    """Rules between the concerns."""
    data.num_microbatches(layout.dp)
    data.check_rampup(layout.dp)
    if data.seq_length > spec.max_position_embeddings:
        raise ModelLinkError(f"sequence length {data.seq_length} is beyond the model's {spec.max_position_embeddings} positions",
                             where="--seq-length", fix="shorten it, or raise --max-position-embeddings if the model is to learn "
                             "longer sequences")
    if parallel.sequence_parallel and data.seq_length % layout.tp:
        raise ModelLinkError(f"sequence length {data.seq_length} is not a multiple of tensor parallel size {layout.tp}",
                             where="--seq-length, --sequence-parallel")
    if layout.cp > 1 and data.seq_length % (2 * layout.cp * (layout.tp if parallel.sequence_parallel else 1)):
        raise ModelLinkError(f"sequence length {data.seq_length} cannot be cut into {2 * layout.cp} chunks"
                             + (f" for {layout.tp} tensor-parallel ranks" if parallel.sequence_parallel else ""),
                             where="--seq-length, --context-parallel-size", fix="each rank holds two chunks of a sequence")
    if optimizer.attention_dropout and layout.cp // layout.ulysses > 1:
        raise ModelLinkError("ring attention drops no weights", where="--attention-dropout, --context-parallel-algo",
                             fix="use --context-parallel-algo ulysses_cp_algo, or no attention dropout")
    if spec.num_experts and layout.tp > 1 and not parallel.sequence_parallel:
        raise ModelLinkError(f"experts with tensor parallel size {layout.tp} need sequence parallelism",
                             where="--sequence-parallel", fix="add --sequence-parallel")
    passes = data.num_microbatches(layout.dp)
    if layout.vpp > 1 and passes % layout.pp:
        raise ModelLinkError(f"{passes} micro batches are not a multiple of the {layout.pp} interleaved stages",
                             where="--global-batch-size, --num-layers-per-virtual-pipeline-stage")


def _end_of_document(data: DataConfig, companions: Path | None, vocab_size: int) -> int:
    """The id that ends a document: what was said, else what the model's own config says."""
    known: object = data.eod_token_id
    if known is None and companions is not None and (companions / "config.json").is_file():
        known = json.loads((companions / "config.json").read_text("utf-8")).get("eos_token_id")
    if not isinstance(known, int) or known >= vocab_size:
        raise ModelLinkError("documents are to be told apart, and the token that ends one is "
                             + ("not known" if known is None else f"{known}: not one of the {vocab_size} ids"),
                             where="--eod-token-id", fix="give the id of the tokenizer's end of text")
    return known


def _check_instruction(spec: ModelSpec, data: DataConfig, instruction: InstructionConfig, moe: MoEConfig) -> None:
    """Settings of instruction data belong to it; and lengths that differ between ranks."""
    if not data.is_instruction_dataset:
        for field in fields_of(InstructionConfig):
            if getattr(instruction, field.name) != field.default and field.name != "prompt_type":
                raise ModelLinkError(f"{field.flag} is about instruction data, and this trains on plain text", where=field.flag,
                                     fix="use modellink-train sft, or leave it out")
    for flag, given in (("--reset-attention-mask", data.reset_attention_mask), ("--eod-mask-loss", data.eod_mask_loss)):
        if data.is_instruction_dataset and given:
            raise ModelLinkError("instruction data says itself what is learned and which tokens are one sample", where=flag,
                                 fix="leave it out; --reset-position-ids keeps the samples of a packed row apart")
    if instruction.variable_seq_lengths and spec.num_experts and moe.moe_token_dispatcher_type == "allgather":
        raise ModelLinkError("experts gather as many tokens of every rank, and the lengths differ",
                             where="--variable-seq-lengths, --moe-token-dispatcher-type",
                             fix="use --moe-token-dispatcher-type alltoall")


def _check_experts(spec: ModelSpec, moe: MoEConfig, lora: LoraConfig) -> None:
    """Switches for experts need some; one product for all of them is a product of their whole weights."""
    adapted = sorted({"linear_fc1", "linear_fc2"} & set(lora.modules))
    for flag, given in (("--moe-grouped-gemm", moe.moe_grouped_gemm),
                        ("--moe-permutation-async-comm", moe.moe_permutation_async_comm)):
        if given and spec.num_experts is None:
            raise ModelLinkError("the model has no experts", where=f"{flag}, --num-experts", fix="leave it out")
    if moe.moe_grouped_gemm and lora.lora_quantize is not None:
        raise ModelLinkError(f"weights held as {lora.lora_quantize} are made whole expert by expert",
                             where="--moe-grouped-gemm, --lora-quantize", fix="leave out --moe-grouped-gemm")
    if moe.moe_grouped_gemm and adapted:
        raise ModelLinkError(f"adapters of {', '.join(adapted)} are computed expert by expert",
                             where="--moe-grouped-gemm, --lora-target-modules", fix="leave out --moe-grouped-gemm")


def _check_family(config: CheckpointConfig) -> None:
    """A model that starts from random weights belongs to no family until somebody says to which."""
    if config.model_type_hf is None:
        raise ModelLinkError("the family of the model is not known, and its checkpoints could not become a Hugging Face folder",
                             where="--model-type-hf",
                             fix=f"give one of {', '.join(family_names())}, or {NO_FORM} for a model that has no such form")
    if config.model_type_hf != NO_FORM:
        family_of(config.model_type_hf, "--model-type-hf")
