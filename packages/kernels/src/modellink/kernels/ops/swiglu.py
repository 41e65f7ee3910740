"""SiLU-gated activation (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modellink.kernels.ops.door import form_of


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 x ffn] (gate, then up) -> silu(gate) * up [..., ffn]."""
    return form_of("swiglu", x.device.type, FORMS, plain)(x)


def plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def npu(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_swiglu(x, -1)
    return result


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"npu": npu}
