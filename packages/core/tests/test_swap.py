# SPDX-License-Identifier: Apache-2.0
"""Activations wait in host memory: what leaves really leaves, comes back one layer ahead, and no gradient differs in a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import beside

training = beside(__file__, "test_training")
SWAP = {"swap_attention": True}
VPP = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, layout, memory options in addition to --swap-attention
    "alone": (1, {"hidden_dropout": 0.1, "attention_dropout": 0.1}, {}),
    "every module": (1, {}, {"swap_modules": "input_norm,self_attention,post_attention_norm,mlp"}),
    "feed-forward parts recomputed": (1, {}, {"recompute_num_layers": 2, "recompute_method": "block"}),
    "block and activation": (1, {}, BLOCK | {"recompute_activation_function": True}),
    "selective": (1, {}, {"recompute_granularity": "selective"}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}, {}),
    "vpp, feed-forward parts": (2, VPP, {"recompute_num_layers": 1, "recompute_method": "block",
                                         "enable_recompute_layers_per_pp_rank": True}),
    "tp2 bf16": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "bf16": True}, {}),
    "ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}, {})}


@pytest.mark.parametrize("name", RUNS)
def test_the_steps_are_those_of_the_run_without(pools, tiny, corpus, name):
    size, layout, memory = RUNS[name]
    texts = {"load": str(tiny), "data_path": (str(corpus),), "train_iters": 3} | layout
    plain = pools(size)(training.train, options=texts)[-1]
    assert pools(size)(training.train, options=texts | SWAP | memory)[-1] == plain


def watched(folder: str, memory: dict[str, Any]) -> dict[str, Any]:
    """On a rank: a pass of the tiny model, forward and backward.

    Returns:
        `stay`: bytes kept by nodes outside the moved modules; `out`: bytes moved; `alive`: bytes of them that are still there;
        `order`: what was fetched, and the layers as they went backward; `grads`: the sum of all gradients.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.config import MemoryConfig
    from modellink.core.memory.swap import swap
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(), seed=1)
    (model,) = build_models(open_checkpoint(Path(folder)).spec, BuildSettings())
    moved: list[tuple[Any, int]] = []
    order: list[tuple[str, int]] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def observe(way: str, number: int, storage: Any) -> None:
        if way == "out":
            moved.append((StorageWeakRef(storage), storage.nbytes()))
        elif order[-1:] != [("in", number)]:
            order.append(("in", number))
    swap([model], MemoryConfig(**memory), observe)
    for number, layer in enumerate(model.decoder.layers):
        layer.self_attention.linear_proj.register_full_backward_hook(
            lambda *_, number=number: order.append(("back", number)))
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(torch.arange(24)[None])
    alive = sum(size for reference, size in moved if not reference.expired())
    output.sum().backward()
    return {"stay": sum(kept.values()), "out": sum(size for _, size in moved), "alive": alive, "order": order,
            "grads": [parameter.grad for parameter in model.parameters()]}


def test_what_is_moved_leaves_and_comes_back_one_layer_ahead(pools, tiny):
    import torch

    plain = pools(1)(watched, folder=str(tiny), memory={})[0]
    swapped = pools(1)(watched, folder=str(tiny), memory=SWAP)[0]
    assert plain["out"] == 0 and [what for what, _ in plain["order"]] == ["back"] * 4
    assert all(torch.equal(a, b) for a, b in zip(plain["grads"], swapped["grads"], strict=True))
    tokens, numbers = 24, 4
    attention = (48 + (6 + 2 * 2) * 20 + 6 * 20) * tokens * numbers  # a layer's input, its queries, keys, values, its output
    assert swapped["out"] >= 4 * attention and swapped["stay"] <= plain["stay"] - 4 * attention
    assert swapped["alive"] == 0
    assert swapped["order"] == [("in", 3), ("in", 2), ("back", 3), ("in", 1), ("back", 2), ("in", 0), ("back", 1), ("back", 0)]
