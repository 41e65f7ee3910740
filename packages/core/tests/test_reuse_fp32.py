# SPDX-License-Identifier: Apache-2.0
"""bf16 weights as upper halves of the fp32 parameters: the same losses with 2 bytes less per parameter, also after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import beside

training = beside(__file__, "test_training")
DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}), "distributed optimizer": (2, DISTRIBUTED),
    "vpp": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1})}


def halved(values: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On a rank: numbers, the halves' bf16 part, and what both give together."""
    from modellink.core.memory.reuse_fp32 import Halves

    numbers = torch.cat([torch.tensor(values), torch.randn(10000, generator=torch.Generator().manual_seed(3))])
    halves = Halves(torch.zeros(numbers.numel(), dtype=torch.bfloat16))
    halves.store(numbers)
    return numbers, halves.upper, halves.whole()


def test_two_halves_are_the_number(pools):
    tie = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0x7F7F0000], dtype=torch.int32).view(torch.float32).tolist()
    numbers, upper, whole = pools(1)(halved, values=[0.0, -0.0, float("inf"), 1e-40, 3.4e38, *tie])[0]
    assert torch.equal(upper, numbers.bfloat16())
    away = (whole.view(torch.int32) - numbers.view(torch.int32)).abs()
    down = (numbers.view(torch.int32) & 0x1FFFF) == 0x8000  # half-way, and the even neighbor is below
    assert down.sum() == 2 and torch.equal(away, down.int())


@pytest.fixture(scope="module")
def run(pools, tiny, corpus):
    def go(name: str, function=training.train, **options: Any) -> Any:
        size, more = RUNS[name]
        texts = {"load": str(tiny), "data_path": (str(corpus),), "bf16": True}
        return pools(size)(function, options=texts | more | options)[-1]
    return go


@pytest.mark.parametrize("name", RUNS)
def test_the_steps_are_those_of_the_run_without(run, tmp_path, name):
    straight = run(name)
    assert run(name, reuse_fp32_param=True) == straight
    stopped = run(name, reuse_fp32_param=True, save=str(tmp_path / "a"), exit_interval=2)
    for reuse in (True, False):  # what was saved continues either way
        assert stopped + run(name, load=str(tmp_path / "a"), reuse_fp32_param=reuse) == straight


def held(options: dict[str, Any]) -> tuple[int, int]:
    """On a rank: (bytes of all tensors that a run makes and has after a step, parameters of this rank's model)."""
    import gc

    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from modellink.core import launch, processes
    from modellink.core.prepare.prepare import prepare
    from modellink.core.train.setup import set_up
    from modellink.kernels.options import Layer

    def references(values: Any) -> dict[int, StorageWeakRef]:
        """By the address of the storage, which is not used again while there is a reference."""
        found = [StorageWeakRef(value.untyped_storage()) for value in values if isinstance(value, torch.Tensor)]
        return {reference.cdata: reference for reference in found}

    made_here: dict[int, StorageWeakRef] = {}

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **kwargs or {})
            made_here.update((address, reference) for address, reference in references(tree_leaves(result)).items()
                             if address not in before)
            return result

    run = prepare("pretrain", [Layer("test", training.OPTIONS | options)], launch.world_size())
    processes.join(run.device, run.layout, run.optimizer.seed, instances=run.optimizer_instances)
    gc.collect()
    before = references(gc.get_objects())  # what other tests left in this process
    with Noted():
        made = set_up(run)
        for model in made.models:
            model.zero_grad_buffer()
        made.optimizer.step()
        made.optimizer.zero_grad()
    gc.collect()
    alive = map(torch.UntypedStorage._new_with_weak_ptr, made_here)
    size = sum(storage.nbytes() for storage in alive if storage is not None)
    return size, sum(parameter.numel() for model in made.models for parameter in model.parameters())


@pytest.mark.parametrize(("name", "saved"), [("plain", 2.0), ("distributed optimizer", 1.0)])
def test_bytes_of_a_parameter(run, name, saved):
    """A weight, its gradient, two moments and the fp32 parameter are 18 bytes without, or 6 + 12 / ranks."""
    without, count = run(name, held)
    shared, _ = run(name, held, reuse_fp32_param=True)
    assert without / count == pytest.approx(18 if name == "plain" else 12, abs=0.2)
    assert (without - shared) / count == pytest.approx(saved, abs=0.02)
