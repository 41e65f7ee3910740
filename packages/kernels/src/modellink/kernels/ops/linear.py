"""A linear layer's product, on a CPU by the library that is fast on this processor.

torch multiplies fp32 matrices by MKL, which is made for Intel's: on a Xeon it is the faster one. oneDNN, which torch
brings too, was faster on an AMD EPYC for the products of the forward pass and for the gradient of the input, not for
that of the weight. torch multiplies bf16 matrices by oneDNN, which a processor without bf16 arithmetic slows down to
a fraction of its fp32 rate: widened operands have the same exact products, summed in fp32 too, several times as fast.

What the processor is decides, and not a stopwatch, so that two runs on one machine have the same bits.
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
"""Rows for which a matrix is made wide; fewer do not pay for reading it twice. A guess, not tuned."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    if x.size(-1) != weight.size(1) or x.dtype != weight.dtype:
        raise ValueError(f"linear: {x.dtype} rows of {x.size(-1)} for a {weight.dtype} matrix of {list(weight.shape)}")
    return form_of("linear", x.device.type, FORMS, plain)(x, weight)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


@dataclass(frozen=True)
class Way:
    """How to multiply x [rows, in] and a matrix [out, in], and gradients [rows, out] and x to the gradient of the matrix."""

    product: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        rows: Tensor = _Linear.apply(self, x.flatten(0, -2), weight)
        return rows.view(*x.shape[:-1], weight.size(0))  # there may be no rows


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Way, x: Tensor, weight: Tensor) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[1] else None)
        return way.product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else ctx.way.product(gradient, weight.t())
        return None, of_x, None if x is None else ctx.way.outer(gradient, x)


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


ONE_DNN = Way(_by_onednn, lambda gradient, x: gradient.t() @ x)
WIDENED = Way(lambda x, weight: (x.float() @ weight.float().t()).to(x.dtype),
              lambda gradient, x: (gradient.float().t() @ x.float()).to(x.dtype))


def cpu(x: Tensor, weight: Tensor) -> Tensor:
    way = _ways().get(x.dtype)
    if way is None or (way is WIDENED and x.numel() < WORTH_WIDENING * x.size(-1)):
        return plain(x, weight)
    return way(x, weight)


@functools.cache
def _ways() -> dict[torch.dtype, Way]:
    about = Path("/proc/cpuinfo")
    return ways_of(set(about.read_text("utf-8", "replace").split()) if about.exists() else set())


def ways_of(cpuinfo: set[str]) -> dict[torch.dtype, Way]:
    """What a processor with these words in its description multiplies in another way than torch would."""
    ways: dict[torch.dtype, Way] = {}
    if "AuthenticAMD" in cpuinfo and torch.backends.mkldnn.is_available():
        ways[torch.float32] = ONE_DNN
    if "avx2" in cpuinfo and not cpuinfo & {"avx512_bf16", "amx_bf16"}:
        ways[torch.bfloat16] = WIDENED
    return ways


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cpu": cpu}
