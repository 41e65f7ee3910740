# SPDX-License-Identifier: Apache-2.0
"""Weight matrices in int8 with a scale per row: half or a quarter of the memory, and of the time to read
them.

The compiled step computes with the int8 values. core's model, which runs passes over many tokens, gets each
matrix dequantized for the duration of the product; over so many tokens this costs little.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix [out, in] as int8 values and a scale [out] per row; values x scale approximates it."""

    values: Tensor
    scale: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> Int8Matrix:
        exact = weight.detach().float()
        scale = exact.abs().amax(1).clamp(min=1e-12) / 127
        return cls((exact / scale[:, None]).round().to(torch.int8), scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.values * self.scale[:, None]).to(dtype)


def dequantize_in_forward(module: nn.Module, parameter: nn.Parameter, weight: Int8Matrix) -> None:
    """Let a parameter hold the dequantized matrix during the module's forward pass, and its present data
    otherwise."""
    data = parameter.data

    def fill(*_: object) -> None:
        parameter.data = weight.dequantize(data.dtype)

    def restore(*_: object) -> None:
        parameter.data = data
    module.register_forward_pre_hook(fill)
    module.register_forward_hook(restore, always_call=True)


def trim_heap() -> None:
    """Return freed memory to the system, which the C library would keep (Linux)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
