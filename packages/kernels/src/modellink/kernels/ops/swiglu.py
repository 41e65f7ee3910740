"""SiLU-gated activation (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 x ffn] (gate, then up) -> silu(gate) * up [..., ffn]."""
    if x.size(-1) % 2:
        raise ValueError(f"swiglu: {x.size(-1)} is not gate and up of one size")
    return FORMS.get(x.device.type, plain)(x)


def plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def npu(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_swiglu(x, -1)
    return result


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"npu": npu}
