# SPDX-License-Identifier: Apache-2.0
"""The configuration of a LoRA adapter, and the names of the files in which modellink-train saves one."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

SAVED_FILE, SAVED_FOLDER = "lora.json", "peft"
"""modellink-train describes its adapters in SAVED_FILE next to the iterations, and saves them in each
iteration as the peft folder SAVED_FOLDER."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that its tensors do not tell.

    Args:
        r: the rank.
        alpha: the scale is alpha / r, or with `rslora` alpha / sqrt(r) (https://arxiv.org/abs/2312.03732).
        dropout: dropout of the input in training; it does not change the weights.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.r) if self.rslora else self.r)
