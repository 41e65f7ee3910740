# SPDX-License-Identifier: Apache-2.0
"""Faster ways than core's model to run some passes: the compiled step on a CPU, captured graphs on
accelerators.

Decided once, when a model is loaded. A pass goes to the first path that supports it, else to core's model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.infer.cache import PagedCache
from modellink.infer.graphs import DecodeGraphs, unsupported_reason
from modellink.infer.native.measure import is_faster
from modellink.infer.native.model import CompiledStep, supports
from modellink.infer.passes import Pass
from modellink.kernels.device import Device
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout


class FastPath(Protocol):
    """A faster way to run some passes."""

    def supports(self, work: Pass) -> bool: ...

    def logits(self, work: Pass) -> Tensor | None:
        """Return the wanted logits [wanted, vocabulary] of a pass; None if it turns out that it cannot run
        it."""
        ...


@dataclass(frozen=True)
class FastPathSettings:
    """Which fast paths to use.

    Attributes:
        native: the compiled step on a CPU; None: only if it is measured to be faster.
        int8: keep the weights in int8, which needs the compiled step.
        graphs: captured graphs for decode passes; None: on accelerators only.
    """

    native: bool | None = False
    int8: bool = False
    graphs: bool | None = None


@dataclass(frozen=True)
class LoadedModel:
    """core's model on this rank, with what the decision depends on."""

    module: Any
    spec: ModelSpec
    layout: ParallelLayout
    device: Device
    dtype: torch.dtype


def select_fast_paths(model: LoadedModel, settings: FastPathSettings, *, run: Callable[[Pass], Tensor],
                      make_cache: Callable[[], PagedCache], report: Callable[[str], None]) -> list[FastPath]:
    """Return the fast paths to use.

    Args:
        run: runs a pass with core's model.
        make_cache: makes a small cache for a measurement.
        report: called with each note for the user.

    Raises:
        ModelLinkError: int8 weights are requested and the compiled step does not support the model.
    """
    found: list[FastPath] = []
    if (step := _compiled_step(model, settings, run, make_cache, report)) is not None:
        found.append(step)
    if (graphs := _graphs(model, settings, report)) is not None:
        found.append(graphs)
    return found


def _compiled_step(model: LoadedModel, settings: FastPathSettings, run: Callable[[Pass], Tensor],
                   make_cache: Callable[[], PagedCache],
                   report: Callable[[str], None]) -> CompiledStep | None:
    if settings.native is False and not settings.int8:
        return None
    if not supports(model.spec, model.layout, model.device.torch, model.dtype):
        if settings.int8:
            raise ModelLinkError("int8 weights need the compiled step, which does not support this model on "
                                 "this machine",
                                 where="--int8", fix="remove --int8")
        if settings.native:
            report("note: core's model runs all passes: the compiled step does not support this model here, "
                   "or there is no C compiler")
        return None
    step = CompiledStep(model.module, model.spec, model.dtype, int8=settings.int8)
    if settings.int8:
        report(f"int8 weights: root mean square error {100 * step.error:.2f} % of the weights")
    elif settings.native is None:
        faster, times = is_faster(step.logits, run, make_cache())
        report(f"decoding: {times}")
        if not faster:
            return None
    return step


def _graphs(model: LoadedModel, settings: FastPathSettings,
            report: Callable[[str], None]) -> DecodeGraphs | None:
    wanted = model.device.kind != "cpu" if settings.graphs is None else settings.graphs
    if not wanted:
        return None
    if (reason := unsupported_reason(model.spec, model.layout)) is not None:
        report(f"note: decoding runs without graphs: {reason}")
        return None
    return DecodeGraphs(model.module, model.spec, model.device)
