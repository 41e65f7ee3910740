"""Low-rank adapters: which linears get one, and how large it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option

LEGACY = {"query_key_value": "linear_qkv", "dense": "linear_proj", "dense_h_to_4h": "linear_fc1", "dense_4h_to_h": "linear_fc2"}
"""Names that Legacy models have for linears."""


@dataclass(frozen=True)
class LoraConfig:
    section: ClassVar[str] = "lora"

    lora_target_modules: tuple[str, ...] = option(
        (), "Learn adapters of these linears and nothing else: linear_qkv, linear_proj, linear_fc1, linear_fc2, or what Legacy "
        "calls them.")
    lora_r: int = option(16, "Rank of an adapter.", minimum=1)
    lora_alpha: float = option(32.0, "What an adapter adds is multiplied by alpha / r.", minimum=0)
    lora_dropout: float = option(0.0, "Share of an adapter's input dropped.", minimum=0, maximum=1)
    lora_use_rslora: bool = option(False, "Multiply by alpha / sqrt(r) (rsLoRA).")
    lora_load: Path | None = option(None, "Adapters to go on with, of a run on the same --load.")
    lora_quantize: Literal["nf4", "int8"] | None = option(
        None, "Hold the frozen linears in this form (QLoRA); needs modellink-core[qlora], on CPU and CUDA.")

    @property
    def on(self) -> bool:
        return bool(self.lora_target_modules)

    @property
    def modules(self) -> tuple[str, ...]:
        """The targets under Core's names."""
        return tuple(sorted({LEGACY.get(name, name) for name in self.lora_target_modules}))

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.lora_use_rslora else self.lora_r)

    def check(self) -> None:
        if self.lora_load is not None and not self.on:
            raise ModelLinkError("adapters to go on with, and no linears that have one", where="--lora-load",
                                 fix="repeat the --lora-target-modules of that run")
        if self.lora_load is not None and not self.lora_load.is_dir():
            raise ModelLinkError("the adapters to load are missing", where=f"--lora-load {self.lora_load}")
        if self.lora_quantize is not None and not self.on:
            raise ModelLinkError("weights that are learned cannot be held in fewer bits", where=f"--lora-quantize "
                                 f"{self.lora_quantize}", fix="give --lora-target-modules: then they are frozen")
        if self.lora_quantize is not None and find_spec("bitsandbytes") is None:
            raise ModelLinkError("the library bitsandbytes is missing", where=f"--lora-quantize {self.lora_quantize}",
                                 fix="install modellink-core[qlora]")
