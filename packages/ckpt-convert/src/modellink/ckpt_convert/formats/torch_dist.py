# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints of PyTorch and Megatron-Core (`torch-dist`), which have no layout.

Not here: the files themselves (megatron/distributed.py, megatron/distributed_state.py).
"""

from __future__ import annotations

from pathlib import Path

from modellink.ckpt_convert import blocks
from modellink.ckpt_convert.format import Format, OpenRequest, WriteRequest, model_description
from modellink.ckpt_convert.formats import register
from modellink.ckpt_convert.iterations import iteration_folder, iteration_number
from modellink.ckpt_convert.megatron import distributed, distributed_state, rank_state
from modellink.ckpt_convert.plan import ConversionPlan, PlannedFile
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.weights import weights
from modellink.kernels.parallel import ParallelLayout


@register
class TorchDist(Format):
    name = "torch-dist"
    title = "torch-dist"
    evidence = f"iter_* with {distributed.METADATA} (torch-dist)"
    iterations = True

    def recognize(self, folder: Path) -> bool:
        return distributed.is_distributed(folder)

    def open(self, request: OpenRequest) -> Checkpoint:
        described = model_description(request)
        tensors = distributed.read(request.folder, described.spec)
        return Checkpoint(self.title, request.path, described.spec, described.family, described.companions,
                          tensors, iteration=iteration_number(request.folder),
                          prompt_type=described.prompt_type)

    def plan(self, source: Checkpoint, request: WriteRequest) -> ConversionPlan:
        spec, main, iteration = source.spec, request.dtype or source.main_dtype, source.iteration or 1
        tensors = {name: blocks.shard(source, name, weight, request.dtype or source.dtype(name), tp=1, rank=0)
                   for name, weight in weights(spec).items()}
        arguments = rank_state.arguments(spec, ParallelLayout(), rank_state.Style(), dtype=main,
                                         iteration=iteration)
        made = distributed_state.files(tensors, spec, arguments, iteration=iteration,
                                       shard_bytes=request.shard_bytes)
        files = tuple(PlannedFile(f"{iteration_folder(iteration)}/{name}", layout)
                      for name, layout in made.items())
        return ConversionPlan(source, self.name, self.title, ParallelLayout(), main, files,
                              iteration=iteration)
