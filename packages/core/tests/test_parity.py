# SPDX-License-Identifier: Apache-2.0
"""Every family computes what its Hugging Face form computes: logits and gradients, at every kind of layout.

The models are those of models.py. A model is loaded straight from its Hugging Face folder; its gradients are read by the same
converter from a folder of gradients instead of weights, so that both directions of the mapping are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside

from modellink.kernels.parallel import ParallelLayout

LAYOUTS = {
    "tp1": ParallelLayout(), "tp2": ParallelLayout(tp=2), "pp2": ParallelLayout(pp=2), "cp2": ParallelLayout(cp=2),
    "cp2 ulysses": ParallelLayout(cp=2, ulysses=2), "cp4 hybrid": ParallelLayout(cp=4, ulysses=2),
    "tp2 cp2": ParallelLayout(tp=2, cp=2),
    "ep2": ParallelLayout(ep=2, dp=2), "vpp2": ParallelLayout(pp=2, vpp=2),
    "uneven": ParallelLayout(pp=2, num_layer_list=(3, 1)), "tp2 pp2": ParallelLayout(tp=2, pp=2),
    "tp2 ep2": ParallelLayout(tp=2, ep=2, dp=2)}


def on_rank(folder: str, layout: ParallelLayout) -> dict[str, Any]:
    """Load, run forward and backward through megatron-core's schedule; logits, loss and the worst gradient error of this rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from modellink.ckpt_convert import open_checkpoint
    from modellink.ckpt_convert.weights import read_shard, stage_names, weights
    from modellink.core import processes
    from modellink.core.data.batch import Batch
    from modellink.core.methods.pretrain import Pretrain
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import bare, load_weights
    from modellink.core.parallel.context import local_positions
    from modellink.core.train.step import run_schedule
    from modellink.kernels.device import find

    processes.join(find("cpu"), layout, seed=1)
    settings = BuildSettings(layout=layout, sequence_parallel=layout.tp > 1, make_vocab_size_divisible_by=8)
    source = open_checkpoint(Path(folder) / "weights")
    models = build_models(spec := source.spec, settings)
    load_weights(models, source, settings)
    wrapped = [DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
               for model in models]
    ids = torch.randint(0, 131, (2, 25), generator=torch.Generator().manual_seed(4))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 24))
    seen = []
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
            seen.append(output.detach().clone())  # the backward pass writes over them
        models[-1].register_forward_hook(keep)
    for model in wrapped:
        model.zero_grad_buffer()
        model.config.finalize_model_grads_func = finalize_model_grads
    passes = 2 * layout.vpp
    loss = run_schedule(Pretrain(None), wrapped, lambda: iter([batch] * passes), num_microbatches=passes, seq_length=24,
                        micro_batch_size=2)["loss"]
    logits = None
    if seen:
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(seen[0])[..., :131]
        if layout.cp > 1:
            group, whole = parallel_state.get_context_parallel_group(), torch.zeros(2, 24, 131)
            whole[:, local_positions(logits.size(1), logits.device)] = logits
            dist.all_reduce(whole, group=group)
            logits = whole

    table, expected = weights(spec), open_checkpoint(Path(folder) / "gradients")
    worst = ("", 0.0)
    stage, expert_rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    for chunk, model in enumerate(wrapped):
        names = stage_names(spec, layout, stage, chunk, expert_rank)
        for own, parameter in bare(model).named_parameters():
            name, tp_rank = names[own], parallel_state.get_tensor_model_parallel_rank()
            gradient = read_shard(expected, name, table[name], tp=layout.tp, rank=tp_rank, divisible_by=8)
            difference = (parameter.main_grad - gradient).abs()
            if table[name].split == "vocab":  # rows that only fill up have no gradient
                difference = difference[:max(0, 131 - tp_rank * len(difference))]
            if difference.numel() and (error := difference.max().item()) > worst[1]:
                worst = (name, error)
    dist.barrier()
    return {"logits": logits, "loss": loss.item(), "worst": worst}


MODELS = beside(__file__, "models")
MIXTURES = ("mixtral", "moe", "deepseek", "grok")
FEW = ("cp4 hybrid", "cp2 ulysses", "tp2 cp2", "uneven", "vpp2", "tp2 pp2", "tp2 ep2")
"""Layouts that cross or cut further what the others do alone: for models that between them have every feature."""
VARIED = ("llama llama3 tied", "mixtral", "qwen2_moe", "gemma2", "bloom", "gpt2 gelu", "deepseek_v2", "chatglm: chatglm3-6b",
          "baichuan: baichuan2-13b", "internlm2: internlm2 dynamic", "grok: grok-1", "minicpm: minicpm-moe-8x2b")
ULYSSES = ("mistral window", "qwen: qwen-7b")
"""Models with features of attention that the varied ones have in another form: a window in every layer, scaled queries."""
CASES = [(case, layout) for layout in LAYOUTS for case in MODELS.cases()  # process groups are made once a layout
         if ("ep2" not in layout or any(word in case for word in MIXTURES))
         and (layout not in FEW or case in VARIED or (layout == "cp2 ulysses" and case in ULYSSES))]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model, made when it is first asked for."""
    @cache
    def folder(case: str) -> Path:
        path = tmp_path_factory.mktemp(re.sub(r"\W+", "-", case))
        MODELS.make(case, path)
        return path
    return folder


@pytest.mark.parametrize(("case", "layout"), CASES)
def test_logits_and_gradients_equal_the_reference(made, pools, case, layout):
    folder = made(case)
    expected = torch.load(folder / "expected.pt")
    for result in pools(LAYOUTS[layout].world_size)(on_rank, folder=str(folder), layout=LAYOUTS[layout]):
        assert result["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert result["worst"][1] < 1e-4 * max(1, expected["loss"]), result["worst"]
        if result["logits"] is not None:
            torch.testing.assert_close(result["logits"], expected["logits"], atol=1e-5, rtol=1e-5)
