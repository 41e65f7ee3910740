# SPDX-License-Identifier: Apache-2.0
"""Detecting formats, choosing an iteration, and options for checkpoints of other programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from states import load_state

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.ckpt_convert.iterations import last_complete
from modellink.ckpt_convert.manifest import read_manifest
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import MARKER
from modellink.kernels.parallel import ParallelLayout

Make = Callable[..., Path]


@pytest.fixture
def ours(make_model: Make, tmp_path: Path) -> Path:
    """A Megatron-Core checkpoint of ours at TP 2, PP 2."""
    convert(make_model("qwen2"), tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=2, pp=2))
    return tmp_path / "mc"


@pytest.fixture
def foreign(ours: Path) -> Path:
    """The same as Megatron or the original leaves it: no marker, no manifest, no configuration."""
    shutil.rmtree(ours / "hf")
    (ours / "modellink.json").unlink()
    (ours / "iter_0000001" / MARKER).unlink()
    return ours


def copy_iteration(root: Path, number: int) -> Path:
    return Path(shutil.copytree(root / "iter_0000001", root / f"iter_{number:07d}"))


def test_what_an_opened_checkpoint_says(ours: Path, make_model: Make) -> None:
    checkpoint = open_checkpoint(ours)
    assert checkpoint.describe() == "Megatron-Core, TP 2 x PP 2, float32, iteration 1"
    assert checkpoint.companions == ours / "hf" and checkpoint.folder == ours and checkpoint.family == "qwen2"
    assert open_checkpoint(ours / "iter_0000001").spec == checkpoint.spec
    assert open_checkpoint(make_model("llama", name="other", dtype=torch.bfloat16)).describe() == (
        "Hugging Face, one rank, bfloat16")


def test_manifest(ours: Path) -> None:
    manifest = read_manifest(ours)
    assert manifest is not None and manifest.family == "qwen2" and manifest.dtype == "float32"
    assert manifest.spec == open_checkpoint(ours).spec and manifest.spec.vocab_size == 131
    values = json.loads((ours / "modellink.json").read_text())
    assert values["format_version"] == 1 and values["producer"].startswith("modellink-ckpt-convert ")


def test_a_manifest_and_a_config_that_disagree(ours: Path) -> None:
    config = json.loads((ours / "hf/config.json").read_text())
    (ours / "hf/config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    with pytest.raises(ModelLinkError, match=r"rotary_base is 5000.0 in .*modellink.json and 7.0 in .*config.json"):
        open_checkpoint(ours)


def test_a_newer_manifest_is_refused(ours: Path) -> None:
    values = json.loads((ours / "modellink.json").read_text())
    (ours / "modellink.json").write_text(json.dumps(values | {"format_version": 2}))
    with pytest.raises(ModelLinkError, match="version 2"):
        open_checkpoint(ours)


@pytest.mark.parametrize("damage", ["no marker", "a file cut off", "a file missing", "not renamed"])
def test_a_half_written_iteration_is_passed_over(damage: str, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = copy_iteration(ours, 20)
    (ours / "latest_checkpointed_iteration.txt").write_text("20")
    file = last / "mp_rank_01_001/model_optim_rng.pt"
    if damage == "no marker":
        (last / MARKER).unlink()
    elif damage == "a file cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "a file missing":
        file.unlink()
    else:
        last.rename(last.with_name(last.name + ".tmp"))
    assert open_checkpoint(ours).iteration == 1
    assert "skipped iter_0000020" in capsys.readouterr().err
    with pytest.raises(ModelLinkError, match="no complete iteration 20"):
        last_complete(ours, 20)


def test_the_last_complete_iteration_or_the_one_asked_for(ours: Path) -> None:
    copy_iteration(ours, 30)
    copy_iteration(ours, 4)
    assert open_checkpoint(ours).iteration == 30
    assert open_checkpoint(ours, iteration=4).iteration == 4


def test_nothing_complete_says_why(ours: Path) -> None:
    (ours / "iter_0000001" / MARKER).unlink()
    with pytest.raises(ModelLinkError, match=r"no complete iteration[\s\S]*iter_0000001: it has no"):
        open_checkpoint(ours)
    with pytest.raises(ModelLinkError, match="not complete"):
        open_checkpoint(ours / "iter_0000001")


def test_a_foreign_checkpoint_needs_a_configuration(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLinkError, match=r"--tokenizer-name-or-path[\s\S]*--model-type-hf"):
        open_checkpoint(foreign)
    with pytest.raises(ModelLinkError, match=r"has no config.json"):
        open_checkpoint(foreign, hf=tmp_path)
    checkpoint = open_checkpoint(foreign, hf=tmp_path / "hf")
    assert checkpoint.layout == ParallelLayout(tp=2, pp=2) and checkpoint.companions == tmp_path / "hf"


@pytest.mark.parametrize("named", ["release", "1"])
def test_a_foreign_checkpoint_is_the_one_its_tracker_names(named: str, foreign: Path, tmp_path: Path) -> None:
    copy_iteration(foreign, 7)
    if named == "release":
        (foreign / "iter_0000001").rename(foreign / "release")
        (foreign / "latest_checkpointed_iteration.txt").write_text("release\n")
    checkpoint = open_checkpoint(foreign, hf=tmp_path / "hf")
    assert checkpoint.iteration == (None if named == "release" else 1)
    (foreign / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ModelLinkError, match=r"needs its latest_checkpointed_iteration.txt"):
        open_checkpoint(foreign, hf=tmp_path / "hf")


def test_a_foreign_checkpoint_with_other_arguments(foreign: Path, make_model: Make) -> None:
    other = make_model("qwen2", name="other", num_hidden_layers=6)
    with pytest.raises(ModelLinkError, match="num_layers is 4 in the checkpoint's arguments and 6 in the configuration"):
        open_checkpoint(foreign, hf=other)


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_state(path)
    edit(state["model"])
    torch.save(state, path)


def test_what_training_adds_is_ignored(foreign: Path, tmp_path: Path) -> None:
    for path in foreign.rglob("*.pt"):
        def add(model: dict[str, object]) -> None:
            model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            model["rotary_pos_emb.inv_freq"] = torch.zeros(4)
            for name in [name for name in model if name.endswith("input_layernorm.weight")]:  # the name of a fused norm
                layer = name.removesuffix("input_layernorm.weight")
                model[f"{layer}self_attention.linear_qkv.layer_norm_weight"] = model.pop(name)
        rewrite(path, add)
    convert(foreign, tmp_path / "back", to="hf", hf=tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "straight", to="hf")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "straight/model.safetensors").read_bytes()


def test_damaged_ranks(foreign: Path, tmp_path: Path) -> None:
    folder = foreign / "iter_0000001"
    path = folder / "mp_rank_01_001/model_optim_rng.pt"
    good = path.read_bytes()
    path.write_bytes(good[:-500])
    with pytest.raises(ModelLinkError, match=r"not a complete torch.save archive[\s\S]*mp_rank_01_001"):
        open_checkpoint(foreign, hf=tmp_path / "hf")
    path.write_bytes(good)
    rewrite(path, lambda model: model.pop("decoder.layers.1.mlp.linear_fc1.weight"))
    with pytest.raises(ModelLinkError, match=r"missing: decoder.layers.1.mlp.linear_fc1.weight"):
        open_checkpoint(foreign, hf=tmp_path / "hf")
    rewrite(path, lambda model: model.update({"decoder.layers.1.mlp.linear_fc1.weight": torch.zeros(36, 48)[:, ::2]}))
    with pytest.raises(ModelLinkError, match=r"row-major"):
        open_checkpoint(foreign, hf=tmp_path / "hf")
    rewrite(path, lambda model: model.update({"decoder.layers.1.mlp.linear_fc1.weight": torch.zeros(35, 24)}))
    with pytest.raises(ModelLinkError, match=r"has the shape \[35, 24\]; by the configuration it is \[36, 24\]"):
        open_checkpoint(foreign, hf=tmp_path / "hf")
    shutil.rmtree(path.parent)
    with pytest.raises(ModelLinkError, match=r"rank 1 of pipeline stage 1 is missing"):
        open_checkpoint(foreign, hf=tmp_path / "hf")


def test_unknown_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelLinkError, match="folder is missing"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelLinkError, match="this is a file"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(ModelLinkError, match=r"looked for model.safetensors"):
        open_checkpoint(tmp_path)
