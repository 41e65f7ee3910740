# SPDX-License-Identifier: Apache-2.0
"""Every preset builds at its layout: each distinct pipeline stage, on the `meta` device, as a rank of its full cluster would.

The ranks are those of a fake process group in a process of their own (this file, run as a program): it answers what rank of how
many this is and moves nothing, so that a stage of a model of 200 billion parameters takes a fraction of a second.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from modellink.core.presets import load_preset, preset_names


def stages(name: str) -> list[int]:
    """The stages that differ: the first of each number of layers and of each kind of contents."""
    preset = load_preset(name)
    layout, spec = preset.layout, preset.spec
    kinds = {}
    for stage in range(layout.pp):
        chunks = [layout.layers(spec.num_layers, stage, chunk) for chunk in range(layout.vpp)]
        inside = tuple(tuple(spec.layer(number).experts is not None for number in layers) for layers in chunks)
        kinds.setdefault((stage == 0, stage == layout.pp - 1, inside), stage)
    return sorted(kinds.values())


@pytest.fixture(scope="session")
def built() -> dict[str, dict[str, str]]:
    """Preset -> stage -> "ok" or what is wrong."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_builds_at_its_layout(built, name):
    assert built[name] == {str(stage): "ok" for stage in stages(name)}


def build(name: str, stage: int) -> str:
    """Build a stage and compare every parameter with the table of weights."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from modellink.ckpt_convert.weights import stage_names, weights
    from modellink.core import engine, processes
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.parallel import padded_vocab_size, shard_ranges

    preset = load_preset(name)
    spec, layout, divisor = preset.spec, preset.layout, preset.parallel.get("make_vocab_size_divisible_by", 1)
    rank = stage * (layout.world_size // layout.pp)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    processes.make_groups(layout, gloo=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    settings = BuildSettings(layout=layout, dtype=torch.bfloat16, sequence_parallel=layout.tp > 1,
                             make_vocab_size_divisible_by=divisor, initialize=False)
    with engine.without_memory():
        models = build_models(spec, settings)
    table = weights(spec)
    try:
        for chunk, model in enumerate(models):
            found = {key.removeprefix("module."): tuple(value.shape) for key, value in model.named_parameters()}
            expected = {}
            for own, canonical in stage_names(spec, layout, stage, chunk).items():
                weight, shape = table[canonical], list(table[canonical].shape)
                size = padded_vocab_size(shape[0], layout.tp, divisor) if weight.split == "vocab" else shape[weight.dim]
                shape[weight.dim] = sum(map(len, shard_ranges(weight.split, size, layout.tp, 0)))
                expected[own] = tuple(shape)
            if found != expected:
                return f"chunk {chunk}: {sorted(set(found.items()) ^ set(expected.items()))[:4]}"
        return "ok"
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    from modellink.core import engine
    from modellink.kernels.device import find

    engine.start(find("cpu"))
    print(json.dumps({name: {stage: build(name, stage) for stage in stages(name)} for name in preset_names()}))
