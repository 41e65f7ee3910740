# SPDX-License-Identifier: Apache-2.0
"""The model across its ranks: a pass in, logits over the full vocabulary out on every rank.

Pipeline stages pass hidden states on and the last one broadcasts its logits; ranks that hold different
experts compute the same tokens. Importing this module imports megatron-core, so import it after
`processes.join`.
"""

from __future__ import annotations

import os
import sys
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
from modellink.infer.cache import PagedCache, bytes_per_token, cache_bytes
from modellink.infer.fast_paths import FastPathSettings, LoadedModel, select_fast_paths
from modellink.infer.native.measure import CACHE_TOKENS
from modellink.infer.pages import PAGE_SIZE
from modellink.infer.passes import Pass
from modellink.kernels.device import Device
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

CACHE_SHARE = 0.5  # of the memory that is free after the weights are loaded
MAX_PASS_LOGITS = 1 << 26  # numbers in the logits of one pass, 256 MB in fp32


class Network:
    """The model of a checkpoint with its weights, sharded across ranks.

    Args:
        show: print progress and notes to stderr.
        fast_paths: which passes may bypass core's model. Default: see `FastPathSettings`.

    Attributes:
        fast_paths: tried in order before core's model.
    """

    def __init__(self, source: Source, layout: ParallelLayout, device: Device, dtype: torch.dtype, *,
                 show: bool, fast_paths: FastPathSettings | None = None) -> None:
        self.spec, self.layout, self.dtype, self.device = source.spec, layout, dtype, device.torch
        self._memory = device
        settings = BuildSettings(layout=layout, dtype=dtype)
        models = build_models(source.spec, settings)
        load_weights(models, source, settings, show=show)
        (model,) = models
        self._model = model.eval().requires_grad_(False)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self._layers = layout.layers(self.spec.num_layers, stage)
        self._is_first_stage, self._is_last_stage = stage == 0, stage == layout.pp - 1

        def report(note: str) -> None:
            if show:
                print(note, file=sys.stderr)
        self.fast_paths = select_fast_paths(
            LoadedModel(self._model, self.spec, layout, device, dtype), fast_paths or FastPathSettings(),
            run=self._run_pass, report=report,
            make_cache=lambda: self.make_cache(max_sequences=1, max_chunk=PAGE_SIZE, tokens=CACHE_TOKENS))

    def make_cache(self, *, max_sequences: int, max_chunk: int, tokens: int | None = None,
                   most: int | None = None) -> PagedCache:
        """Allocate a cache.

        Args:
            max_sequences, max_chunk: see `PagedCache`.
            tokens: capacity. Default: `most`, or less if half of the free memory is too little for that.
            most: capacity to try for. Default: `max_sequences` sequences of the maximum length.

        Raises:
            ModelLinkError: `tokens` do not fit into the free memory.
        """
        sizes: dict[str, Any] = {"max_sequences": max_sequences, "max_chunk": max_chunk, "tp": self.layout.tp,
                                 "dtype": self.dtype}
        free = self._smallest(self._memory.available())
        if tokens is None:
            per_token = bytes_per_token(self.spec, len(self._layers), self.layout.tp, self.dtype)
            share = CACHE_SHARE / int(os.environ.get("MODELLINK_REPLICAS", "1"))  # see server/replicas.py
            capacity = self._smallest(int(share * free // per_token // PAGE_SIZE * PAGE_SIZE))
            wanted = most or max_sequences * (self.spec.max_position_embeddings + PAGE_SIZE)
            tokens = min(wanted, max(capacity, PAGE_SIZE))
        elif (needed := cache_bytes(self.spec, self._layers, tokens=tokens, **sizes)) > free:
            fits = int(tokens * free / needed) // PAGE_SIZE * PAGE_SIZE
            raise ModelLinkError(f"a cache of {tokens:,} tokens needs {needed / 1e9:,.1f} GB, and "
                                 f"{free / 1e9:,.1f} GB of memory are free", where="--cache-tokens",
                                 fix=f"use at most {fits:,}")
        return PagedCache(self.spec, self._layers, tokens=tokens, device=self.device, **sizes)

    def logits(self, work: Pass) -> Tensor:
        """Run a pass and return the wanted logits [wanted, vocabulary] in fp32."""
        for path in self.fast_paths:
            if path.supports(work) and (found := path.logits(work)) is not None:
                return found
        return self._run_pass(work)

    def _run_pass(self, work: Pass) -> Tensor:
        return self.run_model(work.token_ids, work.state())[0]

    def run_model(self, ids: Tensor, state: SequenceState | None = None) -> Tensor:
        """Run core's model on token ids [batch, seq], without a state on full sequences and without a cache.

        Returns:
            logits [batch, seq (or n of `state.wanted`), vocabulary] in fp32.
        """
        if not self._is_first_stage:
            hidden = torch.empty(ids.size(1), ids.size(0), self.spec.hidden_size, dtype=self.dtype,
                                 device=self.device)
            dist.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            self._model.set_input_tensor([hidden])
        output = self._model(ids.to(self.device), state)
        if not self._is_last_stage:
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

    def _smallest(self, value: int) -> int:
        """Return the smallest value of all ranks."""
        if self.layout.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def broadcast_ints(self, values: list[int]) -> list[int]:
        """Return the values of the first rank on every rank; all ranks pass equally many."""
        if self.layout.world_size == 1:
            return values
        tensor = torch.tensor(values, device=self.device)
        dist.broadcast(tensor, src=0)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's object on every rank."""
        if self.layout.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
