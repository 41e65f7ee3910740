"""A linear layer's product.

torch multiplies fp32 matrices on a CPU by MKL, which is made for Intel's: on a Xeon it is the faster one. oneDNN, which torch
brings too, was faster on an AMD EPYC for the products of the forward pass and for the gradient of the input, not for that of the
weight. The maker of the processor decides, and not a stopwatch, so that two runs on one machine have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.door import form_of


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    if x.size(-1) != weight.size(1) or x.dtype != weight.dtype:
        raise ValueError(f"linear: {x.dtype} rows of {x.size(-1)} for a {weight.dtype} matrix of {list(weight.shape)}")
    return form_of("linear", x.device.type, FORMS, plain)(x, weight)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def cpu(x: Tensor, weight: Tensor) -> Tensor:
    return one_dnn(x, weight) if x.dtype == torch.float32 and _amd() else plain(x, weight)  # torch takes oneDNN for bf16 itself


def one_dnn(x: Tensor, weight: Tensor) -> Tensor:
    rows: Tensor = _OneDnn.apply(x.flatten(0, -2), weight)
    return rows.view(*x.shape[:-1], weight.size(0))  # there may be no rows


@functools.cache
def _amd() -> bool:
    about = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and about.exists() and "AuthenticAMD" in about.read_text("utf-8", "replace")


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else _product(gradient, weight.t())
        return of_x, None if x is None else gradient.t() @ x


def _product(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cpu": cpu}
