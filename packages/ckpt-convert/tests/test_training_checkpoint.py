# SPDX-License-Identifier: Apache-2.0
"""A training checkpoint, with objects of classes that are not installed here, is opened and converted."""

from __future__ import annotations

import enum
import importlib.util
import io
import random
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from states import load_state
from tiny_models import make_folder, spec_of

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.kernels.parallel import ParallelLayout


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Classes of modules that exist while the file is written, but not when it is read."""
    parts = ("somewhere", "somewhere.core", "somewhere.core.enums")
    for name in parts:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kinds = enum.Enum("AttnBackend", {"flash": 1, "auto": 5}, module=parts[-1])
    states = type("ShardedObject", (), {"__module__": parts[-1]})
    scheduler = type("OptimizerParamScheduler", (), {"__module__": parts[-1]})
    for cls in (kinds, states, scheduler):
        setattr(sys.modules[parts[-1]], cls.__name__, cls)

    def forget() -> None:
        for name in parts:
            monkeypatch.delitem(sys.modules, name)
        assert importlib.util.find_spec("somewhere") is None
    return SimpleNamespace(kind=kinds.flash, state=states, scheduler=scheduler, forget=forget)


@pytest.mark.parametrize("target", ["megatron-core", "megatron-legacy"])
def test_a_training_checkpoint_converts_without_megatron(target: Any, absent: Any, tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of("qwen2"))
    convert(tmp_path / "hf", tmp_path / "mg", to=target, layout=ParallelLayout(tp=2, pp=2))
    for path in (tmp_path / "mg").rglob("model_optim_rng.pt"):
        state = load_state(path)
        names = vars(state["args"]) | {"attention_backend": absent.kind, "params_dtype": torch.bfloat16, "lr": 1e-4}
        state["args"] = Namespace(**names)
        model = state["model"] if target == "megatron-core" else state["model"]["language_model"]["encoder"]
        model["layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8 scales")
        model["layers.0.self_attention.linear_qkv._extra_state"] = None
        step = absent.scheduler()
        step.num_steps, step.kinds = 7, {absent.kind}
        rng = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
               "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
               "rng_tracker_states": {"model-parallel-rng": torch.ones(3)}}
        optimizer = {"optimizer": {"state": {0: {"step": torch.tensor(7), "exp_avg": torch.randn(4, 3)}},
                                   "param_groups": [{"lr": np.float64(1e-4), "params": [0]}]},
                     "fp32_from_fp16_params": [[torch.randn(4, 3)]], "sharded": absent.state()}
        torch.save(state | {"optimizer": optimizer, "opt_param_scheduler": step, "rng_state": [rng], "iteration": 7}, path)
    (tmp_path / "mg/iter_0000001").rename(tmp_path / "mg/iter_0000007")
    (tmp_path / "mg/iter_0000007/modellink.complete").unlink()
    (tmp_path / "mg/modellink.json").unlink()
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("7")
    absent.forget()
    with pytest.raises(Exception, match="somewhere"):
        torch.load(next((tmp_path / "mg").rglob("*.pt")), weights_only=False)  # as Megatron does
    assert open_checkpoint(tmp_path / "mg", hf=tmp_path / "hf").iteration == 7
    convert(tmp_path / "mg", tmp_path / "back", to="hf", hf=tmp_path / "hf", verify=True)
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    kept = convert(tmp_path / "mg", tmp_path / "again", to="megatron-core", hf=tmp_path / "hf", layout=ParallelLayout(pp=4))
    assert kept.plan.iteration == 7
