"""A run, checked: everything the commands decide before any process starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

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
from modellink.core.start import architecture, check_continued, find_start, where_from
from modellink.kernels.device import Device, find
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, fields_of, resolve
from modellink.kernels.parallel import ParallelLayout

# In the order of Run's fields.
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
        for config in (self.spec, *(value for value in vars(self).values() if isinstance(value, CONFIGS))):
            values |= vars(config)
        return values

    @property
    def order(self) -> dict[str, Any]:
        """By name, what the order of the data comes from, wherever the data lies; as JSON gives it back."""
        return {"data_path": [Path(item).name for item in self.data.data_path], "split": self.data.split,
                "seq_length": self.data.seq_length, "seed": self.optimizer.seed}

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
    configs: dict[type, Any] = resolve(CONFIGS, *other_layers).configs
    checkpoint, lora = where_from(configs[CheckpointConfig], configs[LoraConfig])
    configs |= {CheckpointConfig: checkpoint, LoraConfig: lora}
    parallel, data, optimizer = configs[ParallelConfig], configs[DataConfig], configs[OptimizerConfig]
    resilience = configs[ResilienceConfig]
    start = find_start(checkpoint, lora)
    check_continued(start.progress, start.resumed, load_optim=checkpoint.load_optim, by_samples=optimizer.by_samples,
                    distributed_optimizer=parallel.use_distributed_optimizer, instruction=data.is_instruction_dataset)
    spec = architecture(start.source, model_layers)
    layout = parallel.layout(spec.num_layers, world_size or parallel.processes() * resilience.nodes[1])
    spec.check_layout(layout)
    done, consumed = (start.progress.iteration, start.progress.consumed_samples) if start.progress else (0, 0)
    if start.progress and data.global_batch_size is None:  # that of the run, also on fewer ranks
        data = replace(data, global_batch_size=start.progress.global_batch_size)
    if optimizer.train_samples is not None:
        configs[OptimizerConfig] = replace(optimizer, train_iters=data.iterations_of(
            optimizer.train_samples, layout.dp, done=done, consumed=consumed))
    if not data.is_instruction_dataset and (data.separates_documents or data.eod_mask_loss):
        companions = start.source.companions if start.source else checkpoint.tokenizer_name_or_path
        data = replace(data, eod_token_id=_end_of_document(data, companions, spec.vocab_size))
    configs[DataConfig] = data
    halves = resilience.enable_high_availability and parallel.use_distributed_optimizer
    values = (spec, *(configs[kind] for kind in CONFIGS), layout, find(parallel.device, local_rank), start.source, start.resumed,
              2 if halves else 1)
    run = Run(**dict(zip((field.name for field in fields(Run)), values, strict=True)))
    rules.check(run)
    return run


def _end_of_document(data: DataConfig, companions: Path | None, vocab_size: int) -> int:
    """The id that ends a document: what was said, else what the model's own config says."""
    known: object = data.eod_token_id
    if known is None and companions is not None and (companions / "config.json").is_file():
        known = json.loads((companions / "config.json").read_text("utf-8")).get("eos_token_id")
    if not isinstance(known, int) or known >= vocab_size:
        found = ("not known" if known is None else f"{known}: not one of the {vocab_size} ids" if isinstance(known, int) else
                 f"one of {known} by the model's config.json")
        raise ModelLinkError(f"documents are to be told apart, and the token that ends one is {found}",
                             where="--eod-token-id", fix="give the id of the tokenizer's end of text")
    return known
