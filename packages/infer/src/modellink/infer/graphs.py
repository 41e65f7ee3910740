# SPDX-License-Identifier: Apache-2.0
"""Decode passes replayed from captured graphs, for devices where launching the kernels takes longer than
running them.

A graph is captured for a number of sequences and a number of keys, both rounded up to powers of two. What
changes between passes is in buffers that are filled before the replay; padding sequences write to a slot that
belongs to no page. If a model cannot be captured, it runs without graphs and the reason is printed once. Not
here: passes with prefill chunks, several ranks, mixtures of experts (their shapes depend on the data).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.state import SequenceState
from modellink.infer.attention import PassPlan, PlannedAttention
from modellink.infer.cache import PagedCache
from modellink.infer.passes import Pass
from modellink.kernels.device import Device
from modellink.kernels.messages import note
from modellink.kernels.parallel import ParallelLayout

MIN_KEYS = 128


def unsupported_reason(spec: ModelSpec, layout: ParallelLayout) -> str | None:
    """Return why a model cannot be captured, None if it can."""
    if layout.world_size > 1:
        return "the layout has several ranks, which communicate within a pass"
    if spec.num_experts is not None:
        return "the tensor shapes of a mixture of experts depend on the data"
    if spec.rope_scaling_type == "dynamic":
        return "dynamic rotary scaling recomputes the full sequence for each token"
    return None


def round_up(number: int, minimum: int = 1) -> int:
    """Return the next power of two, at least `minimum`."""
    return max(minimum, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class _Graph:
    """A captured pass and its buffers: token ids and positions [1, sequences], and one plan per pool."""

    ids: Tensor
    positions: Tensor
    plans: list[PassPlan]
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """The graphs of one model, each captured when a pass of its size first occurs.

    Attributes:
        failed: a capture failed; no further one is tried.
    """

    def __init__(self, model: Any, spec: ModelSpec, device: Device) -> None:
        self._model, self._spec, self._device = model, spec, device
        self._captured: dict[tuple[int, int], _Graph] = {}
        self._cache: PagedCache | None = None
        self.failed = False

    def supports(self, work: Pass) -> bool:
        return work.is_decode and not self.failed

    def logits(self, work: Pass) -> Tensor | None:
        """Return the wanted logits [wanted, vocabulary] of a decode pass; None if its graph cannot be
        captured."""
        if work.cache is not self._cache:  # the graphs refer to its tensors
            self._cache, self._captured = work.cache, {}
        count = len(work.chunks)
        size = round_up(count), round_up(work.length, MIN_KEYS)
        plans = work.padded_plans(*size)
        graph = self._captured.get(size)
        if graph is None:
            try:
                graph = self._captured[size] = self._capture(size[0], plans, work.cache)
            except RuntimeError as error:
                self.failed, self._captured = True, {}
                note(f"decoding runs without graphs, capturing one failed: {str(error).splitlines()[0]}")
                return None
        graph.ids[0, :count] = work.token_ids[0].to(graph.ids.device)
        graph.positions[0, :count] = work.positions
        for held, new in zip(graph.plans, plans, strict=True):
            held.overwrite(new)
        return graph.replay()[list(work.wanted)]

    def _capture(self, sequences: int, plans: list[PassPlan], cache: PagedCache) -> _Graph:
        buffers = torch.zeros(2, 1, sequences, dtype=torch.long, device=self._device.torch)
        plans = [plan.copy(self._device.torch) for plan in plans]
        attention = PlannedAttention(cache, plans)

        def run() -> Tensor:
            # the maximum length, so that tables by position are computed before the capture and never grow
            state = SequenceState(positions=buffers[1], length=self._spec.max_position_embeddings,
                                  cache=attention)
            output: Tensor = self._model(buffers[0], state)[0, :, :self._spec.vocab_size].float()
            return output
        return _Graph(buffers[0], buffers[1], plans, self._device.capture(run))
