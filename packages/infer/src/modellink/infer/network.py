"""The model on this rank, as generation sees it: token ids in, logits of the whole vocabulary out on every rank.

Pipeline stages hand hidden states on and the last one shares its logits; ranks that hold other experts compute the same tokens.
Importing this module imports megatron-core, so it comes after `processes.join`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from modellink.ckpt_convert.weights import Source
from modellink.core.model.build import BuildSettings, build_models
from modellink.core.model.load import load_weights
from modellink.core.model.state import SequenceState
from modellink.infer.cache import SIZE, PagedCache, bytes_of, bytes_per_token
from modellink.infer.graphs import Graphs, refusal
from modellink.infer.native.measure import pays
from modellink.infer.native.view import Step, takes
from modellink.kernels.device import Device
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

CACHE_SHARE = 0.5  # of the memory that is free once the weights are there
PASS_LOGITS = 1 << 26  # numbers in the logits of one pass, 256 MB in fp32


@dataclass(frozen=True)
class Scoring:
    """The cache that texts are scored with, and the longest one it was made for."""

    longest: int
    cache: PagedCache


class Network:
    """The model of a checkpoint, cut over ranks, with its weights.

    Args:
        native: let the compiled step compute passes of few tokens where it takes the model; None measures whether it pays.
        int8: keep the weights in int8.
        graphs: compute passes of single tokens from captured graphs; None does it where there is an accelerator.

    Attributes:
        scoring: see score.py; None before the first text, and where it was dropped.
    """

    def __init__(self, source: Source, layout: ParallelLayout, device: Device, dtype: torch.dtype, *, show: bool,
                 native: bool | None = False, int8: bool = False, graphs: bool | None = None) -> None:
        self.spec, self.layout, self.dtype, self.device = source.spec, layout, dtype, device.torch
        self._on = device
        self.scoring: Scoring | None = None
        settings = BuildSettings(layout=layout, dtype=dtype)
        models = build_models(source.spec, settings)
        load_weights(models, source, settings, show=show)
        (model,) = models
        self._model = model.eval().requires_grad_(False)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self._layers = layout.layers(self.spec.num_layers, stage)
        self._first, self._last = stage == 0, stage == layout.pp - 1
        self.step: Step | None = None
        self.graphs: Graphs | None = None
        if (native is not False or int8) and takes(self.spec, layout, self.device, dtype):
            self.step = Step(self._model, self.spec, dtype, int8=int8)
        if native and self.step is None and show:
            print("note: core's model computes all passes: the compiled step does not take this model here, or there is no C "
                  "compiler", file=sys.stderr)
        if native is None and not int8 and self.step is not None:
            faster, words = pays(self)
            self.step = self.step if faster else None
            if show:
                print(f"single tokens: {words}", file=sys.stderr)
        if int8 and self.step is None:
            raise ModelLinkError("int8 weights are for the compiled step, which does not take this model here", where="--int8",
                                 fix="leave it out")
        if graphs or (graphs is None and device.kind != "cpu"):
            if (reason := refusal(self.spec, layout)) is None:
                self.graphs = Graphs(self._model, self.spec, device)
            elif show:
                print(f"note: single tokens are computed without graphs: {reason}", file=sys.stderr)
        if int8 and show and self.step is not None:
            print(f"int8 weights: root mean square error {100 * self.step.error:.2f} % of the weights", file=sys.stderr)

    def cache(self, *, rows: int, piece: int, tokens: int | None = None, most: int | None = None) -> PagedCache:
        """A cache for so many rows.

        Args:
            tokens: that it holds. None: `most`, or what half of the free memory has room for.
            most: None: as many as rows of the longest length have.

        Raises:
            ModelLinkError: there is no memory for so many `tokens`.
        """
        sizes: dict[str, Any] = {"rows": rows, "piece": piece, "tp": self.layout.tp, "dtype": self.dtype}
        (free,) = self._smallest(self._on.available())
        if tokens is None:
            per_token = bytes_per_token(self.spec, len(self._layers), self.layout.tp, self.dtype)
            share = CACHE_SHARE / int(os.environ.get("MODELLINK_REPLICAS", "1"))  # see server/replicas.py
            (room,) = self._smallest(int(share * free // per_token // SIZE * SIZE))
            tokens = min(most or rows * (self.spec.max_position_embeddings + SIZE), max(room, SIZE))
        elif (needed := bytes_of(self.spec, self._layers, tokens=tokens, **sizes)) > free:
            fits = int(tokens * free / needed) // SIZE * SIZE
            raise ModelLinkError(f"a cache of {tokens:,} tokens takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB of memory are "
                                 "free", where="--cache-tokens", fix=f"use at most {fits:,}")
        return PagedCache(self.spec, self._layers, tokens=tokens, device=self.device, **sizes)

    def logits(self, ids: Tensor, state: SequenceState | None = None) -> Tensor:
        """Token ids [batch, seq] -> logits [batch, seq (or n of `state.wanted`), vocabulary] in fp32."""
        if self.step is not None and state is not None and isinstance(state.cache, PagedCache) and self.step.takes(
                state.cache, ids.size(1)):
            assert state.positions is not None and state.wanted is not None
            return self.step.logits(ids[0], state.cache, state.positions[0], state.wanted[0])[None]
        if self.graphs is not None and state is not None and isinstance(state.cache, PagedCache) and state.cache.singles:
            assert state.positions is not None and state.wanted is not None
            found = self.graphs.logits(ids[0], state.positions[0], state.cache)
            if found is not None:
                return found[state.wanted[0]][None]
            state.cache.plan([])
        if not self._first:
            hidden = torch.empty(ids.size(1), ids.size(0), self.spec.hidden_size, dtype=self.dtype, device=self.device)
            dist.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            model: Any = self._model
            model.set_input_tensor([hidden])
        output = self._model(ids.to(self.device), state)
        if not self._last:
            dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
            count = ids.size(1) if state is None or state.wanted is None else state.wanted.size(1)
            full = torch.empty(len(ids), count, self.spec.vocab_size, device=self.device)
        else:
            if self.layout.tp > 1:
                output = gather_from_tensor_model_parallel_region(output)
            full = output[..., :self.spec.vocab_size].float()
        if self.layout.pp > 1:
            full = full.contiguous()
            dist.broadcast(full, src=parallel_state.get_pipeline_model_parallel_last_rank(),
                           group=parallel_state.get_pipeline_model_parallel_group())
        return full

    def _smallest(self, *values: int) -> list[int]:
        """The smallest of what the ranks have, on every rank."""
        if self.layout.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor.tolist()

    def agree(self, values: list[int]) -> list[int]:
        """The values of the first rank, on every rank."""
        if self.layout.world_size == 1:
            return values
        tensor = torch.tensor(values, device=self.device)
        dist.broadcast(tensor, src=0)
        return tensor.tolist()

    def share(self, value: Any) -> Any:
        """An object of the first rank, on every rank."""
        if self.layout.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
