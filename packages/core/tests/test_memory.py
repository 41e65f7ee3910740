# SPDX-License-Identifier: Apache-2.0
"""Recomputation, overlap and the ways to cut a sequence change no number; what saves memory saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import beside

training = beside(__file__, "test_training")
VPP = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}
OVERLAP = {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "uniform": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}),
    "block": (1, BLOCK | {"recompute_num_layers": 3}), "block, more than there are": (1, BLOCK | {"recompute_num_layers": 30}),
    "selective": (1, {"recompute_granularity": "selective"}),
    "activation": (1, {"recompute_activation_function": True}),
    "block and activation": (1, BLOCK | {"recompute_num_layers": 1, "recompute_activation_function": True,
                                         "recompute_activation_function_num_layers": 2}),
    "block, vpp, by stage": (2, VPP | BLOCK | {"recompute_num_layers": 1, "enable_recompute_layers_per_pp_rank": True,
                                               "recompute_activation_function": True}),
    "block, tp2": (2, BLOCK | {"recompute_num_layers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "activation, tp2": (2, {"recompute_activation_function": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "uniform, cp2": (2, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
                         "context_parallel_size": 2}),
    "ring, not overlapped": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo",
                                 "use_cp_send_recv_overlap": False}),
    "ulysses, keys for every head": (2, {"context_parallel_size": 2, "kv_head_repeat_before_uly_alltoall": True}),
    "ulysses in a ring": (4, {"context_parallel_size": 4, "context_parallel_algo": "hybrid_cp_algo",
                              "ulysses_degree_in_cp": 2}),
    "overlapped gradients": (2, {"overlap_grad_reduce": True}),
    "overlapped gradients, parameters": (2, OVERLAP | {"overlap_param_gather": True}),
    "overlapped, vpp": (4, VPP | OVERLAP | {"overlap_param_gather": True})}


@pytest.fixture(scope="module")
def whole(pools, tiny, corpus):
    texts = {"load": str(tiny), "data_path": (str(corpus),), "eval_iters": 1, "eval_interval": 2, "split": "80,10,10"}
    return texts, pools(1)(training.train, options=texts)[-1]


@pytest.mark.parametrize("name", RUNS)
def test_losses_stay_the_same(pools, whole, name):
    texts, expected = whole
    world_size, options = RUNS[name]
    steps = pools(world_size)(training.train, options=texts | options)[-1]
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in expected], rel=2e-6)
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in expected], rel=1e-5)


def test_dropout_is_the_same_in_the_recomputed_pass(pools, whole):
    texts, _ = whole
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    plain = pools(1)(training.train, options=texts | dropout)[-1]
    again = pools(1)(training.train, options=texts | dropout | RUNS["block"][1])[-1]
    assert [step[2:] for step in again] == [step[2:] for step in plain]


def test_overlapped_parameters_are_whole_in_a_checkpoint(pools, whole, tmp_path):
    texts, _ = whole
    options = texts | OVERLAP | {"overlap_param_gather": True}
    straight = pools(2)(training.train, options=options)[-1]
    stopped = pools(2)(training.train, options=options | {"save": str(tmp_path), "exit_interval": 2})[-1]
    assert stopped + pools(2)(training.train, options=options | {"load": str(tmp_path)})[-1] == straight


LATENT = {"multi_head_latent_attention": True, "num_query_groups": None, "kv_channels": None, "kv_lora_rank": 12,
          "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def held(folder: str, memory: dict[str, Any], changes: dict[str, Any]) -> tuple[int, int]:
    """On a rank: (bytes that backward keeps, times a layer is run) in one pass of the tiny model."""
    from dataclasses import replace

    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.config import MemoryConfig
    from modellink.core.memory.apply import save_memory
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(), seed=1)
    spec = replace(open_checkpoint(Path(folder)).spec, **changes)
    (model,) = build_models(spec, BuildSettings(memory=MemoryConfig(**memory), attention_dropout=0.1))
    save_memory([model], MemoryConfig(**memory))
    storages: dict[int, Any] = {}
    runs = 0

    def keep(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(torch.zeros(1, 24, dtype=torch.long))
    size = sum(storage.size() for storage in storages.values())
    output.sum().backward()
    return size, runs


def test_memory_is_saved_and_layers_run_again(pools, tiny):
    plain, once = pools(1)(held, folder=str(tiny), memory={}, changes={})[0]
    sizes = {name: pools(1)(held, folder=str(tiny), memory=RUNS[name][1], changes={})[0] for name in (
        "block", "block, more than there are", "uniform", "activation", "selective")}
    assert once == 4 and {name: runs for name, (_, runs) in sizes.items()} == {
        "block": 7, "block, more than there are": 8, "uniform": 8, "activation": 4, "selective": 4}
    assert sizes["uniform"][0] < sizes["block"][0] < sizes["activation"][0] < plain
    ffn = 4 * 24 * 112 * 4  # bytes: layers x tokens x width, kept for the second projection
    assert plain - sizes["activation"][0] >= ffn
    scores = 4 * 6 * 24 * 24 * 4  # layers x heads x tokens x tokens, which attention with dropout keeps
    assert plain - sizes["selective"][0] >= scores


def test_selective_recomputation_saves_memory_in_latent_attention_too(pools, tiny):
    plain, selective = (pools(1)(held, folder=str(tiny), memory=memory, changes=LATENT)[0][0]
                        for memory in ({}, RUNS["selective"][1]))
    assert plain - selective >= 4 * 6 * 24 * 24 * 4


def widest(folder: str) -> list[tuple[str, int]]:
    """On a rank: of a bf16 pass with its loss, type and size of what the backward pass keeps that is as wide as logits."""
    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.data.batch import Batch
    from modellink.core.methods.pretrain import Pretrain
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(), seed=1)
    (model,) = build_models(open_checkpoint(Path(folder)).spec, BuildSettings(dtype=torch.bfloat16))
    tokens, kept = torch.zeros(1, 24, dtype=torch.long), {}

    def keep(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dim() and tensor.size(-1) >= model.module.spec.vocab_size:
            kept[tensor.untyped_storage().data_ptr()] = (str(tensor.dtype), tensor.numel() // 24)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, loss_of = Pretrain(None).forward_step(iter([Batch(tokens, tokens, torch.ones(1, 24))]), model.train())
        loss_of(logits)
    return sorted(kept.values())


def test_logits_of_16_bits_stay_so(pools, tiny):
    assert {kind for kind, _ in pools(1)(widest, folder=str(tiny))[0]} == {"torch.bfloat16"}


def dropped(folder: str, memories: list[dict[str, Any]]) -> list[list[int]]:
    """On a rank of two interleaved stages of 8 layers: for each setting the bytes that each chunk's two layers keep."""
    from dataclasses import replace

    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.config import MemoryConfig
    from modellink.core.memory.apply import save_memory
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    layout = ParallelLayout(pp=2, vpp=2)
    processes.join(find("cpu"), layout, seed=1)
    spec = replace(open_checkpoint(Path(folder)).spec, num_layers=8)
    sizes = []
    for memory in memories:
        sizes.append([])
        models = build_models(spec, BuildSettings(layout=layout, memory=MemoryConfig(**memory)))
        save_memory(models, MemoryConfig(**memory))
        for model in models:
            kept: dict[int, Any] = {}

            def keep(tensor: Any, kept: dict[int, Any] = kept) -> Any:
                if not isinstance(tensor, torch.nn.Parameter):
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
                return tensor
            hidden = torch.randn(24, 1, 48, requires_grad=True)
            model.decoder.set_input_tensor(hidden)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = model.train().decoder(hidden, None)
            for angle in model.decoder.layers[0].self_attention.rotary.angles:  # all layers share them
                kept.pop(angle.untyped_storage().data_ptr(), None)
            sizes[-1].append(sum(storage.size() for storage in kept.values()))  # an activation that was dropped has none
            output.sum().backward()
    return sizes


STAGE = {"enable_recompute_layers_per_pp_rank": True}
ACTIVATION = {"recompute_activation_function": True}
KINDS: list[tuple[dict[str, Any], list[tuple[int, int]]]] = [  # setting, (in full, activation alone) of each chunk's two layers
    (BLOCK | {"recompute_num_layers": 1}, [(1, 0), (1, 0)]), (BLOCK | {"recompute_num_layers": 1} | STAGE, [(1, 0), (0, 0)]),
    (BLOCK | {"recompute_num_layers": 3} | STAGE, [(2, 0), (1, 0)]),
    (ACTIVATION, [(0, 2), (0, 2)]), (ACTIVATION | {"recompute_activation_function_num_layers": 1}, [(0, 1), (0, 0)]),
    (ACTIVATION | {"recompute_activation_function_num_layers": 3}, [(0, 2), (0, 1)]),
    (BLOCK | {"recompute_num_layers": 1} | ACTIVATION, [(1, 1), (1, 1)]),
    (BLOCK | {"recompute_num_layers": 1} | ACTIVATION | {"recompute_activation_function_num_layers": 1}, [(1, 1), (1, 0)]),
    (BLOCK | {"recompute_num_layers": 1} | STAGE | ACTIVATION, [(1, 1), (0, 2)]),
    (BLOCK | {"recompute_num_layers": 1} | STAGE | ACTIVATION | {"recompute_activation_function_num_layers": 2},
     [(1, 1), (0, 1)]),
    (BLOCK | {"recompute_num_layers": 3} | STAGE | ACTIVATION, [(2, 0), (1, 1)])]


def test_every_layer_of_every_chunk_drops_what_it_should(pools, tiny):
    """Layer l of chunk v has place l x chunks + v: the first places in full, of the next the activation alone."""
    for number, measured in enumerate(pools(2)(dropped, folder=str(tiny), memories=[{}, *(kind for kind, _ in KINDS)])):
        plain, *others = measured
        in_full = plain[0] - others[0][0]
        activation = (plain[0] - others[3][0]) // 2
        assert activation >= 24 * 112 * 4 and in_full > plain[0] // 3, number
        for (setting, chunks), sizes in zip(KINDS, others, strict=True):
            expected = [size - full * in_full - alone * activation
                        for size, (full, alone) in zip(plain, chunks, strict=True)]
            assert sizes == expected, setting
