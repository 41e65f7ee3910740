# SPDX-License-Identifier: Apache-2.0
"""SiLU-gated activation (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up [..., ffn] of x [..., 2 x ffn] (gate, then up)."""
    if x.size(-1) % 2:
        raise ValueError(f"swiglu: {x.size(-1)} cannot be split into gate and up of equal size")
    return form_of("swiglu", x.device.type, FORMS, plain)(x)


def plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def cpu(x: Tensor) -> Tensor:
    result: Tensor = _InPlace.apply(x)
    return result


class _InPlace(torch.autograd.Function):
    """Fewer passes over memory; the halves of the gradient are written directly into the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), gradient, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result


def npu(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_swiglu(x, -1)
    return result


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"cpu": cpu, "npu": npu}
