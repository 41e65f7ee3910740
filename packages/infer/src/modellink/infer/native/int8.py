"""Matrices in int8, with a scale for each row: half or a quarter of the memory, and of the time that reading them takes.

The compiled step computes with the values themselves. core's model, which takes passes of many tokens, is lent each matrix as
long as it multiplies by it; beside so many tokens, making it costs little.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Int8:
    """A matrix [out, in] as int8 values and a scale [out] for each row, such that values x scale is the nearest there is."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        exact = weight.detach().float()
        scale = exact.abs().amax(1).clamp(min=1e-12) / 127
        return cls((exact / scale[:, None]).round().to(torch.int8), scale)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return (self.values * self.scale[:, None]).to(dtype)


def lend(module: nn.Module, parameter: nn.Parameter, weight: Int8) -> None:
    """Let a parameter hold the matrix of `weight` while a module computes, and what it holds now at other times."""
    held = parameter.data

    def give(*_: object) -> None:
        parameter.data = weight.matrix(held.dtype)

    def take(*_: object) -> None:
        parameter.data = held
    module.register_forward_pre_hook(give)
    module.register_forward_hook(take, always_call=True)


def give_back() -> None:
    """Let the system have the memory of what was freed, which the C library would keep (Linux)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
