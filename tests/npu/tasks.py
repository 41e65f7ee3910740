# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_runs.py, on the simulated device or on the CPU: the same calls, `device` apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ranks import beside

CORE = Path(__file__).resolve().parents[2] / "packages" / "core" / "tests"


def train(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """A run of core's tests: (iteration, samples, loss, gradient norm) of every step on the last rank; the kernels it came to."""
    device = sys.modules.get("device")
    if device is not None:
        del device.reached[:]
    steps = beside(str(CORE / f"{kind}.py"), kind).train(options)
    return {"steps": steps, "kernels": sorted(set(device.reached)) if device else []}


def where(options: dict[str, Any]) -> set[str]:
    """The kinds of devices that parameters, gradients and optimizer state of a run are on."""
    from modellink.core import launch, processes
    from modellink.core.prepare.prepare import prepare
    from modellink.core.train.setup import set_up
    from modellink.kernels.options import Layer

    run = prepare("pretrain", [Layer("test", options)], launch.world_size())
    processes.join(run.device, run.layout, run.optimizer.seed)
    training = set_up(run)
    tensors = [*(parameter for model in training.models for parameter in model.parameters()),
               *(parameter.main_grad for model in training.models for parameter in model.parameters()),
               *(parameter for group in training.optimizer.param_groups for parameter in group["params"])]
    return {tensor.device.type for tensor in tensors}


def random_states() -> tuple[list[str], list[bool]]:
    """Names of the random states of a rank; for each, whether it is what it was after other seeds and a return."""
    import torch

    from modellink.core.train.random_state import random_state, set_random_state

    device = torch.device("npu", torch.npu.current_device())  # type: ignore[attr-defined]
    torch.npu.manual_seed(3)  # type: ignore[attr-defined]
    before = random_state(device)
    torch.manual_seed(4)  # of the device's generator too
    other = random_state(device)
    set_random_state(before, device)
    again = random_state(device)
    changed = [name for name in before if not torch.equal(before[name], other[name])]
    return changed, [torch.equal(before[name], again[name]) for name in before]


def generate(folder: str, device: str, tp: int) -> dict[str, Any]:
    """Answers to prompts of several lengths, one after the other and together; drawn; and likelihoods."""
    from modellink.infer import load
    from modellink.kernels.parallel import ParallelLayout

    engine = load(folder, layout=ParallelLayout(tp=tp), device=device)
    prompts = [[5, 6, 7], [9] * 20, [100, 2, 3, 77, 8]]
    answers = engine.generate(prompts, max_new_tokens=12, ignore_eos=True, logprobs=True)
    kind = {parameter.device.type for parameter in engine.network._model.parameters()}
    return {"devices": kind, "tokens": [answer.token_ids for answer in answers],
            "logprobs": [value for answer in answers for value in answer.logprobs or ()],
            "drawn": [answer.token_ids for answer in engine.generate(prompts, max_new_tokens=8, temperature=1.4, seed=3)],
            "likelihoods": engine.loglikelihood([([5, 6, 7], [8, 9]), ([30, 11], [78]), ([1] * 30, [5])])}
