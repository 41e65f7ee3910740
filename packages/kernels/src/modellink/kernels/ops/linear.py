# SPDX-License-Identifier: Apache-2.0
"""The product of a linear layer, on a CPU by the library that is fast on this processor.

torch multiplies fp32 matrices with MKL, which is made for Intel processors and is faster on a Xeon. oneDNN,
which torch also includes, was faster on an AMD EPYC for the products of the forward pass and the gradient of
the input, but not for the gradient of the weight. torch multiplies bf16 matrices with oneDNN, which on a
processor without bf16 arithmetic reaches only a fraction of its fp32 rate: converting the operands to fp32
gives the same exact products, also summed in fp32, several times as fast.

The choice depends on the processor, not on measured time, so that two runs on one machine have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.kernels.ops.dispatch import form_of

WORTH_WIDENING = 32
"""Rows from which a matrix is converted to fp32; with fewer, reading it twice costs more. A guess, not tuned."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [..., in] and weight [out, in] -> [..., out]."""
    if x.size(-1) != weight.size(1) or x.dtype != weight.dtype:
        raise ValueError(f"linear: {x.dtype} rows of {x.size(-1)} for a {weight.dtype} matrix of "
                         f"{list(weight.shape)}")
    return form_of("linear", x.device.type, FORMS, plain)(x, weight)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


@dataclass(frozen=True)
class Method:
    """How to multiply x [rows, in] with a matrix [out, in], and gradients [rows, out] with x for the gradient
    of the matrix."""

    product: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        rows: Tensor = _Linear.apply(self, x.flatten(0, -2), weight)
        return rows.view(*x.shape[:-1], weight.size(0))  # there may be no rows


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, method: Method, x: Tensor, weight: Tensor) -> Tensor:
        ctx.method = method
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None,
                              weight if ctx.needs_input_grad[1] else None)
        return method.product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else ctx.method.product(gradient, weight.t())
        return None, of_x, None if x is None else ctx.method.outer(gradient, x)


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


ONE_DNN = Method(_by_onednn, lambda gradient, x: gradient.t() @ x)
WIDENED = Method(lambda x, weight: (x.float() @ weight.float().t()).to(x.dtype),
              lambda gradient, x: (gradient.float().t() @ x.float()).to(x.dtype))


def cpu(x: Tensor, weight: Tensor) -> Tensor:
    method = _methods().get(x.dtype)
    if method is None or (method is WIDENED and x.numel() < WORTH_WIDENING * x.size(-1)):
        return plain(x, weight)
    return method(x, weight)


@functools.cache
def _methods() -> dict[torch.dtype, Method]:
    about = Path("/proc/cpuinfo")
    return methods_of(set(about.read_text("utf-8", "replace").split()) if about.exists() else set())


def methods_of(cpuinfo: set[str]) -> dict[torch.dtype, Method]:
    """Return the dtypes that a processor with these words in /proc/cpuinfo multiplies by another method than
    torch's."""
    methods: dict[torch.dtype, Method] = {}
    if "AuthenticAMD" in cpuinfo and torch.backends.mkldnn.is_available():
        methods[torch.float32] = ONE_DNN
    if "avx2" in cpuinfo and not cpuinfo & {"avx512_bf16", "amx_bf16"}:
        methods[torch.bfloat16] = WIDENED
    return methods


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cpu": cpu}
