# SPDX-License-Identifier: Apache-2.0
"""The second part of --verify: names, shapes and logits of the family's class in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from adapter_models import CONFIG, adapter_of
from tiny_models import MODELS, make_folder, spec_of

from modellink.ckpt_convert import convert, iter_hf_tensors, open_checkpoint, verify_model
from modellink.ckpt_convert.lora import merge_lora
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.verify_model import check_model
from modellink.kernels.errors import InternalError
from modellink.kernels.parallel import ParallelLayout

Run = Callable[..., CompletedProcess[str]]

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is no need of this package")
SQUARE = {"hidden_size": 48, "kv_channels": 6}
CLASSES: dict[str, dict[str, Any]] = {
    "bloom": {}, "deepseek_v2": {}, "deepseek_v2 lite": {}, "gpt2": {},
    "gemma2": SQUARE | {"embedding_multiplier_scale": 48 ** 0.5},
    "llama": SQUARE, "mistral": SQUARE, "mixtral": SQUARE, "qwen2 tied": SQUARE, "qwen2_moe": SQUARE}


def both(name: str, folder: Path, **changes: Any) -> tuple[Checkpoint, Checkpoint]:
    """Return a tiny model as a Hugging Face folder, and converted."""
    family, spec = spec_of(name, **changes)
    make_folder(folder / "hf", family, spec, torch.float32)
    convert(folder / "hf", folder / "mc", to="megatron-core", layout=ParallelLayout(tp=2))
    return open_checkpoint(folder / "hf"), open_checkpoint(folder / "mc")


@pytest.mark.parametrize("name", CLASSES)
def test_same_tensors_and_same_logits(name: str, tmp_path: Path) -> None:
    source, target = both(name, tmp_path, **CLASSES[name])
    assert check_model(source, target).endswith(f"has these {len(dict(iter_hf_tensors(source)))} tensors and gives the same "
                                                "logits from source and target")


@pytest.mark.parametrize("name", [name for name in MODELS if name.split()[0] in ("aquila", "chatglm", "grok")])
def test_families_transformers_does_not_have(name: str, tmp_path: Path) -> None:
    assert check_model(*both(name, tmp_path)) == f"transformers has no class for the family {spec_of(name)[0]}"


def test_what_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = both("llama", tmp_path, **SQUARE)
    merged = merge_lora(source, CONFIG, adapter_of(source.spec, scale=0.1))
    with pytest.raises(InternalError, match=r"logits differ, by at most .*, first at token 0, id"):
        check_model(merged, target)
    monkeypatch.setattr(verify_model, "SHARE", 0)
    assert "so no logits were compared" in check_model(merged, target)
    inverse = verify_model.inverse
    monkeypatch.setattr(verify_model, "inverse", lambda *told: inverse(*told) | {"model.more": inverse(*told)["lm_head.weight"]})
    with pytest.raises(InternalError, match=r"model.more is \[131, 48\] in the output, but missing in LlamaForCausalLM"):
        check_model(source, target)


def test_the_command(tmp_path: Path, run: Run) -> None:
    source, _ = both("llama", tmp_path, **SQUARE)
    write = [source.folder, tmp_path / "out", "--to", "hf", "--params-dtype", "bf16", "--verify"]
    done = run(write)
    assert done.returncode == 0 and "LlamaForCausalLM has these 39 tensors and gives the same logits" in done.stdout, done.stderr
