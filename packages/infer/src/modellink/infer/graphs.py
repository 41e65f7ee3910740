"""Passes of single tokens from captured graphs, for devices on which kernels end sooner than the next ones are started.

A graph is made for a number of rows and a number of keys, both rounded up to powers of two. What changes from pass to pass lies
in buffers that are filled before the graph is replayed; rows beyond those there are write to a slot that no sequence owns. What
cannot be captured runs as it is, and why is printed once. Not here: passes with pieces of prompts, several ranks, mixtures of
experts (their shapes follow the data).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.state import SequenceState
from modellink.infer.cache import PagedCache, Plan
from modellink.kernels.device import Device
from modellink.kernels.parallel import ParallelLayout

FEWEST_KEYS = 128


def refusal(spec: ModelSpec, layout: ParallelLayout) -> str | None:
    """Why a model is not captured, None where it can be."""
    if layout.world_size > 1:
        return "several ranks exchange tensors in the middle of it"
    if spec.num_experts is not None:
        return "the shapes of a mixture of experts follow the data"
    return "dynamic rotary scaling computes whole sequences anew" if spec.rope_scaling_type == "dynamic" else None


def rounded(number: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class _Graph:
    """A pass with its buffers: token ids and positions [1, rows], and where the layers of each pool find their keys."""

    ids: Tensor
    positions: Tensor
    plans: list[Plan]
    replay: Callable[[], Tensor]


class Graphs:
    """The graphs of one model, which are captured when a pass of their size comes first.

    Attributes:
        failed: no graph can be captured here.
    """

    def __init__(self, model: Any, spec: ModelSpec, device: Device) -> None:
        self._model, self._spec, self._device = model, spec, device
        self._made: dict[tuple[int, int], _Graph] = {}
        self._cache: PagedCache | None = None
        self.failed = False

    def logits(self, ids: Tensor, positions: Tensor, cache: PagedCache) -> Tensor | None:
        """Token ids and positions [n] of the pass of single tokens that `cache.state` was told about -> logits
        [at least n, vocabulary], which the next pass writes over; None where it has to be computed without a graph."""
        if self.failed:
            return None
        if cache is not self._cache:  # its tensors are part of the graphs
            self._cache, self._made = cache, {}
        size = rounded(len(ids)), rounded(cache.longest, FEWEST_KEYS)
        plans = cache.padded(*size)
        graph = self._made.get(size)
        try:
            graph = self._made[size] = graph or self._capture(size[0], plans, cache)
        except RuntimeError as error:
            self.failed, self._made = True, {}
            print(f"note: no graph could be captured, single tokens are computed without: {str(error).splitlines()[0]}",
                  file=sys.stderr)
            return None
        graph.ids[0, :len(ids)] = ids.to(graph.ids.device)
        graph.positions[0, :len(positions)] = positions
        for held, new in zip(graph.plans, plans, strict=True):
            held.take(new)
        return graph.replay()

    def _capture(self, rows: int, plans: list[Plan], cache: PagedCache) -> _Graph:
        held = torch.zeros(2, 1, rows, dtype=torch.long, device=self._device.torch)
        plans = [plan.copy(self._device.torch) for plan in plans]

        def work() -> Tensor:
            # with the longest length, so that tables by position are made once, before the capture
            state = SequenceState(positions=held[1], length=self._spec.max_position_embeddings, cache=cache)
            cache.plan(plans)
            output: Tensor = self._model(held[0], state)[0, :, :self._spec.vocab_size].float()
            return output
        return _Graph(held[0], held[1], plans, self._device.capture(work))
