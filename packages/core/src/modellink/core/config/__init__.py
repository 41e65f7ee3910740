# SPDX-License-Identifier: Apache-2.0
"""The options of a run, one dataclass per concern. The architecture is ckpt_convert's ModelSpec. Imports no torch."""

from modellink.core.config.checkpoint import CheckpointConfig
from modellink.core.config.data import DataConfig
from modellink.core.config.determinism import DeterminismConfig
from modellink.core.config.fused import FusedConfig
from modellink.core.config.instruction import InstructionConfig
from modellink.core.config.logging import LoggingConfig
from modellink.core.config.lora import LoraConfig
from modellink.core.config.memory import MemoryConfig
from modellink.core.config.moe import MoEConfig
from modellink.core.config.optimizer import OptimizerConfig
from modellink.core.config.parallel import ParallelConfig
from modellink.core.config.profile import ProfileConfig
from modellink.core.config.resilience import ResilienceConfig

__all__ = ["CheckpointConfig", "DataConfig", "DeterminismConfig", "FusedConfig", "InstructionConfig", "LoggingConfig",
           "LoraConfig", "MemoryConfig", "MoEConfig", "OptimizerConfig", "ParallelConfig", "ProfileConfig", "ResilienceConfig"]
