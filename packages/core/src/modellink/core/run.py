# SPDX-License-Identifier: Apache-2.0
"""A run: the settled and checked settings of one training (made by prepare/). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.ckpt_convert.manifest import Manifest
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
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
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    from modellink.kernels.device import Device

CONFIGS: dict[str, type] = {
    "data": DataConfig, "instruction": InstructionConfig, "checkpoint": CheckpointConfig, "optimizer": OptimizerConfig,
    "parallel": ParallelConfig, "memory": MemoryConfig, "lora": LoraConfig, "moe": MoEConfig, "fused": FusedConfig,
    "logging": LoggingConfig, "profile": ProfileConfig, "determinism": DeterminismConfig, "resilience": ResilienceConfig}
"""Field of Run -> the options it holds, in the order of `--help`."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: name of the training method.
        options: values of the method's own options; None if it has none.
        source: the checkpoint of --load, opened; None for random weights.
        reference: the checkpoint of the frozen reference model, if the method needs one and it is not random.
        resumed: folder of the iteration to resume from; None if training starts at iteration 0.
        optimizer_instances: copies of the distributed optimizer's state, each sharded over a part of the data-parallel ranks.
    """

    method: str
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
    options: Any = None
    source: Checkpoint | None = None
    reference: Checkpoint | None = None
    resumed: Path | None = None
    optimizer_instances: int = 1

    @property
    def manifest(self) -> Manifest:
        """The description that the checkpoints of this run carry."""
        family = self.source.family if self.source else self.checkpoint.model_type_hf
        assert family is not None  # prepare has checked it
        prompt_type = self.instruction.prompt_type or (self.source.prompt_type if self.source else None)
        return Manifest(family, self.spec, self.optimizer.dtype_name, prompt_type, f"modellink-core {version('modellink-core')}")

    @property
    def settings(self) -> dict[str, Any]:
        """All option values by name, those of the model and of the method included."""
        values: dict[str, Any] = {"method": self.method, **vars(self.spec)}
        for name in CONFIGS:
            values |= vars(getattr(self, name))
        return values if self.options is None else values | vars(self.options)

    @property
    def order(self) -> dict[str, Any]:
        """The settings that determine the order of the data, as JSON returns them; independent of where the data is."""
        return {"data_path": [Path(item).name for item in self.data.data_path], "split": self.data.split,
                "seq_length": self.data.seq_length, "seed": self.optimizer.seed}

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that change what a step computes, by option name; a resumed run reports which of them have changed."""
        optimizer = self.optimizer
        names = ("adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "attention_dropout", "hidden_dropout")
        values = optimizer.schedule | {name: getattr(optimizer, name) for name in names}
        values |= {"micro_batch_size": self.data.micro_batch_size, "precision": optimizer.dtype_name}
        return values | ({"lora_dropout": self.lora.lora_dropout} if self.lora.on else {})

    @property
    def sequence_multiple(self) -> int:
        """What the length of a sequence must be a multiple of to be sharded."""
        context = 2 * self.layout.cp if self.layout.cp > 1 else 1
        return context * (self.layout.tp if self.parallel.sequence_parallel else 1)

    @property
    def companions(self) -> Path | None:
        """Folder of the config and tokenizer files that travel with the checkpoints."""
        return self.source.companions if self.source else self.checkpoint.tokenizer_name_or_path
