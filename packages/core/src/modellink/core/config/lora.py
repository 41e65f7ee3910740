# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): which linears get one, and its size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from modellink.ckpt_convert.lora_targets import LEGACY
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option


@dataclass(frozen=True)
class LoraConfig:
    heading: ClassVar[str] = "LoRA"

    lora_target_modules: tuple[str, ...] = option(
        (), "Train LoRA adapters of these linears only: linear_qkv, linear_proj, linear_fc1, linear_fc2, or their Legacy names.")
    lora_r: int = option(16, "Rank of the adapters.", minimum=1)
    lora_alpha: float = option(32.0, "Scale the adapters by alpha / r.", above=0)
    lora_dropout: float = option(0.0, "Dropout of the adapters' input.", minimum=0, below=1)
    lora_use_rslora: bool = option(False, "Scale the adapters by alpha / sqrt(r) instead (rsLoRA).")
    lora_load: Path | None = option(None, "Adapters to start from or resume: a saved run on the same --load, or a PEFT folder.")
    lora_quantize: Literal["nf4", "int8"] | None = option(
        None, "Quantize the frozen linears (QLoRA); needs modellink-core[qlora], on CPU and CUDA.")

    @property
    def on(self) -> bool:
        return bool(self.lora_target_modules)

    @property
    def modules(self) -> tuple[str, ...]:
        """The target modules by their names in Core models."""
        return tuple(sorted({LEGACY.get(name, name) for name in self.lora_target_modules}))

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.lora_use_rslora else self.lora_r)

    def check(self) -> None:
        if self.lora_load is not None and not self.on:
            raise ModelLinkError("--lora-load needs --lora-target-modules", where="--lora-load",
                                 fix="repeat the --lora-target-modules of that run")
        if self.lora_load is not None and not self.lora_load.is_dir():
            raise ModelLinkError("the adapters to load are missing", where=f"--lora-load {self.lora_load}")
        if self.lora_quantize is not None and not self.on:
            raise ModelLinkError("trained weights cannot be quantized", where=f"--lora-quantize {self.lora_quantize}",
                                 fix="add --lora-target-modules, which freezes the other weights")
        if self.lora_quantize is not None and find_spec("bitsandbytes") is None:
            raise ModelLinkError("bitsandbytes is not installed", where=f"--lora-quantize {self.lora_quantize}",
                                 fix='python -m pip install "modellink-core[qlora]"')
