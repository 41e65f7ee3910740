"""A run, checked: everything the commands decide before any process starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

from modellink.ckpt_convert import open_checkpoint
from modellink.ckpt_convert.formats.huggingface import is_huggingface
from modellink.ckpt_convert.formats.peft import is_peft
from modellink.ckpt_convert.iterations import FOLDER, last_complete
from modellink.ckpt_convert.manifest import Manifest
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core import __version__, rules
from modellink.core.config import (
    CheckpointConfig,
    DataConfig,
    DeterminismConfig,
    FusedConfig,
    InstructionConfig,
    LoggingConfig,
    LoraConfig,
    MemoryConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    ResilienceConfig,
)
from modellink.core.posttrain import adapters
from modellink.core.train.progress import read_progress
from modellink.kernels.device import Device, find
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, fields_of, resolve
from modellink.kernels.parallel import ParallelLayout

CONFIGS = (ParallelConfig, DataConfig, InstructionConfig, LoraConfig, OptimizerConfig, MoEConfig, MemoryConfig, FusedConfig,
           CheckpointConfig, LoggingConfig, ProfileConfig, DeterminismConfig, ResilienceConfig)


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
    fused: FusedConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    profile: ProfileConfig
    determinism: DeterminismConfig
    resilience: ResilienceConfig
    layout: ParallelLayout
    device: Device
    source: Checkpoint | None = None
    resumed: Path | None = None
    optimizer_instances: int = 1

    @property
    def manifest(self) -> Manifest:
        """What the checkpoints of this run say of themselves."""
        family = self.source.family if self.source else self.checkpoint.model_type_hf
        assert family is not None  # checked before the run was made
        prompt_type = self.instruction.prompt_type or (self.source.prompt_type if self.source else None)
        return Manifest(family, self.spec, str(self.optimizer.dtype).removeprefix("torch."), prompt_type,
                        f"modellink-core {__version__}")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the run was told, by name."""
        values: dict[str, Any] = {}
        for config in (self.spec, self.parallel, self.data, self.instruction, self.lora, self.optimizer, self.moe, self.memory,
                       self.fused, self.checkpoint, self.logging, self.profile, self.determinism,
                       self.resilience):
            values |= vars(config)
        return values

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
    machines = resolved[ResilienceConfig].nodes[1]
    layout = parallel.layout(spec.num_layers, world_size or parallel.processes() * machines)
    spec.check_layout(layout)
    optimizer = resolved[OptimizerConfig]
    if optimizer.train_samples is not None:
        optimizer = replace(optimizer, train_iters=data.iterations_of(optimizer.train_samples, layout.dp))
    if not data.is_instruction_dataset and (data.separates_documents or data.eod_mask_loss):
        data = replace(data, eod_token_id=_end_of_document(data, source.companions if source else None, spec.vocab_size))
    run = Run(spec, parallel, data, resolved[InstructionConfig], lora, optimizer, resolved[MoEConfig],
              resolved[MemoryConfig], resolved[FusedConfig], checkpoint, resolved[LoggingConfig], resolved[ProfileConfig],
              resolved[DeterminismConfig], (resilience := resolved[ResilienceConfig]), layout, find(parallel.device, local_rank),
              source, resumed, 2 if resilience.enable_high_availability and parallel.use_distributed_optimizer else 1)
    rules.check(run)
    return run


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
    of_adapters = lora.on and lora.lora_load is not None  # then --ckpt-step is theirs
    if config.ckpt_step is not None and is_huggingface(config.load) and not of_adapters:
        raise ModelLinkError(f"iteration {config.ckpt_step} was asked for, and the folder has no iterations",
                             where=f"--ckpt-step, --load {config.load}", fix="leave it out")
    source = open_checkpoint(config.load, family=config.model_type_hf, hf=config.tokenizer_name_or_path,
                             iteration=None if of_adapters else config.ckpt_step)
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
