# SPDX-License-Identifier: Apache-2.0
"""Loads weights from any checkpoint that ckpt_convert reads into the model chunks of this rank, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import nn

from modellink.ckpt_convert.weights import Source, read_shard, stage_names, weights
from modellink.core.model.build import BuildSettings
from modellink.kernels.errors import InternalError
from modellink.kernels.progress import Work


def bare(model: nn.Module) -> nn.Module:
    """The `Model` inside the wrappers for precision and data parallelism."""
    found: nn.Module = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    return found


@torch.no_grad()
def load_weights(models: Sequence[nn.Module], source: Source, settings: BuildSettings, *, show: bool = False) -> None:
    """Fill every parameter; tensors are read, sharded and cast one by one, so that only one exists in addition to the model."""
    spec, layout = source.spec, settings.layout
    table = weights(spec)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    chunks: list[tuple[dict[str, Any], dict[str, str]]] = [
        (dict(bare(model).named_parameters()), stage_names(spec, layout, stage, chunk, expert_rank))
        for chunk, model in enumerate(models)]
    with Work("loading weights", sum(len(names) for _, names in chunks), unit="tensors", show=show) as work:
        for params, names in chunks:
            if params.keys() != names.keys():
                raise InternalError(f"the model and the table of weights differ in {sorted(params.keys() ^ names.keys())}")
            for own, name in names.items():
                params[own].copy_(read_shard(source, name, table[name], tp=layout.tp, rank=tp_rank,
                                             divisible_by=settings.make_vocab_size_divisible_by))
                work.advance()
