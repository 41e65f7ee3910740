# SPDX-License-Identifier: Apache-2.0
"""Adapters in Megatron checkpoints: written and read in any layout, merged into a base in any other; the command line."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from adapter_models import CONFIG, adapter_of, equal
from safetensors.torch import load_file
from states import load_state
from tiny_models import make_folder, spec_of

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.lora import full, merge_lora
from modellink.ckpt_convert.manifest import Manifest, write_companions
from modellink.ckpt_convert.open import open_adapter
from modellink.ckpt_convert.peft import write_peft
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import mark_complete
from modellink.kernels.parallel import ParallelLayout

VERIFY = ["--verify", "--no-verify-model"]
Run = Callable[..., CompletedProcess[str]]
CASES: list[tuple[str, str, ParallelLayout]] = [
    ("llama", "megatron-core", ParallelLayout(tp=2, pp=2)), ("llama tied", "megatron-core", ParallelLayout(tp=4, pp=2, vpp=2)),
    ("llama", "megatron-legacy", ParallelLayout(tp=2, num_layer_list=(1, 3), pp=2)),
    ("gpt2", "megatron-legacy", ParallelLayout(tp=4)),
    ("mixtral", "megatron-core", ParallelLayout(tp=2, ep=2)), ("mixtral", "megatron-core", ParallelLayout(pp=2, ep=2)),
    ("deepseek_v2", "megatron-core", ParallelLayout(tp=2, pp=2))]


def tensors_of(source: Any) -> dict[str, torch.Tensor]:
    return {name: full(tensor) for name, tensor in source.tensors.items()}


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """made(name of a tiny model): writes `base` and `adapter` (peft), returns the adapter's tensors."""

    def make(name: str) -> dict[str, torch.Tensor]:
        family, spec = spec_of(name)
        make_folder(tmp_path / "base", family, spec, torch.float32)
        tensors = adapter_of(spec)
        write_peft(tmp_path / "adapter", spec, family, tensors, CONFIG, base=str(tmp_path / "base"))
        return tensors

    return make


@pytest.mark.parametrize(("name", "to", "layout"), CASES)
def test_any_layout_and_back(name: str, to: str, layout: ParallelLayout, tmp_path: Path, made: Any) -> None:
    tensors = made(name)
    convert(tmp_path / "adapter", tmp_path / "mg", to=to, layout=layout, verify=True)
    base = open_checkpoint(tmp_path / "base")
    found = open_adapter(tmp_path / "mg", base)
    assert found.adapter == CONFIG and found.layout == layout and equal(tensors_of(found), tensors)
    convert(tmp_path / "mg", tmp_path / "back", to="peft", verify=True)
    assert equal(*(load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "back")))
    with pytest.raises(ModelLinkError, match="a LoRA adapter without its model"):
        open_checkpoint(tmp_path / "mg")
    merged = merge_lora(base, CONFIG, tensors)
    convert(merge_lora(base, CONFIG, found.tensors), tmp_path / "merged", to=to, layout=ParallelLayout(tp=2), verify=True)
    assert equal(tensors_of(open_checkpoint(tmp_path / "merged")), tensors_of(merged))


def test_the_command_merges(made: Any, run: Run, tmp_path: Path) -> None:
    tensors = made("llama")
    wanted = tensors_of(merge_lora(open_checkpoint(tmp_path / "base"), CONFIG, tensors))
    done = run([tmp_path / "adapter", tmp_path / "mg", "--to", "megatron-core", "--tp", 2, "--pp", 2, *VERIFY])
    assert done.returncode == 0, done.stderr
    for number, (adapter, more) in enumerate([("adapter", []), ("mg", ["--lora-r", 4, "--lora-alpha", 6])]):
        target = tmp_path / f"merged{number}"
        done = run([tmp_path / "base", target, "--to", "hf", *VERIFY, "--lora-load", tmp_path / adapter, *more])
        assert done.returncode == 0 and "all bit-equal" in done.stdout, done.stderr
        assert equal(tensors_of(open_checkpoint(target)), wanted)
    assert "merged with a LoRA adapter of rank 4, alpha 6" in run(
        [tmp_path / "base", tmp_path / "x", "--to", "hf", "--lora-load", tmp_path / "mg", "--dry-run"]).stdout
    assert "LoRA adapter of rank 4" in run(["inspect", tmp_path / "mg"]).stdout


def test_the_folder_that_training_saves_to(made: Any, run: Run, tmp_path: Path) -> None:
    """The last complete iteration is used, and the prompt type of its training is copied with the weights."""
    tensors = made("llama")
    base = open_checkpoint(tmp_path / "base")
    saved, wanted = tmp_path / "saved", tensors_of(merge_lora(base, CONFIG, tensors))
    write_companions(saved, Manifest(base.family, base.spec, "float32", "chatml"), tmp_path / "base")
    (saved / "lora.json").write_text("{}")
    write_peft(saved / "iter_0000005" / "peft", base.spec, base.family, tensors, CONFIG)
    mark_complete(saved / "iter_0000005")
    (saved / "iter_0000009").mkdir()  # a save that did not finish
    for number, adapter in enumerate([saved, saved / "iter_0000005", saved / "iter_0000005" / "peft"]):
        done = run([tmp_path / "base", tmp_path / f"merged{number}", "--to", "hf", *VERIFY, "--lora-load", adapter])
        assert done.returncode == 0, done.stderr
        opened = open_checkpoint(tmp_path / f"merged{number}")
        assert opened.prompt_type == "chatml" and equal(tensors_of(opened), wanted)
    done = run([tmp_path / "merged0", tmp_path / "mg", "--to", "megatron-core", "--tp", 2, *VERIFY])
    assert done.returncode == 0 and open_checkpoint(tmp_path / "mg").prompt_type == "chatml", done.stderr
    assert run([saved, tmp_path / "peft", "--to", "peft"]).returncode == 0  # the model it belongs to was copied with it


def test_the_command_says_what_is_wrong(made: Any, run: Run, tmp_path: Path) -> None:
    made("llama")
    run([tmp_path / "adapter", tmp_path / "mg", "--to", "megatron-core", "--tp", 2])
    merging = [tmp_path / "base", tmp_path / "x", "--to", "hf", "--lora-load"]
    for arguments, message in [
            ([tmp_path / "mg", tmp_path / "x", "--to", "hf"], "the source is a LoRA adapter"),
            ([tmp_path / "base", tmp_path / "x", "--to", "peft"], "the source is not a LoRA adapter"),
            ([*merging, tmp_path / "mg", "--lora-alpha", 5], "--lora-alpha is 5"),
            ([*merging, tmp_path / "mg", "--lora-r", 3], "--lora-r is 3"),
            ([*merging, tmp_path / "none"], "folder is missing"),
            ([*merging, tmp_path / "base"], "no checkpoint was recognized"),
            ([*merging, tmp_path / "mg", "--lora-target-modules", "query_key_value", "dense"],
             "the adapter has linear_fc1, linear_fc2, linear_proj, linear_qkv, not")]:
        done = run(arguments)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "x").exists(), done.stderr


def original(base: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], folder: Path, *, everything: bool) -> None:
    """A LoRA checkpoint as the original's Core training saves it: base layers renamed, adapters under `default`, no manifest."""
    state = OrderedDict()
    adapted = {name.rpartition(".lora_")[0] for name in tensors}
    for name, tensor in base.items() if everything else ():
        module, _, kind = name.rpartition(".")
        state[f"{module}.base_layer.{kind}" if module in adapted else name] = tensor
    for name, tensor in tensors.items():
        state[name.replace(".weight", ".default.weight")] = tensor
    rank = folder / "iter_0000005" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"args": Namespace(lora_r=4, lora_alpha=6), "model": state, "iteration": 5, "checkpoint_version": 3.0},
               rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")


def test_what_the_originals_training_saves(made: Any, run: Run, tmp_path: Path) -> None:
    """Core saves the base with the adapter: it opens merged, and can be used as an adapter. The original's command line."""
    tensors = made("llama")
    base = open_checkpoint(tmp_path / "base")
    original(tensors_of(base), tensors, tmp_path / "lora", everything=True)
    wanted = tensors_of(merge_lora(base, CONFIG, tensors))
    opened = open_checkpoint(tmp_path / "lora", hf=tmp_path / "base")
    assert opened.merged == CONFIG and equal(tensors_of(opened), wanted)
    convert(base, tmp_path / "mg", to="megatron-legacy", layout=ParallelLayout(pp=2, vpp=2))
    done = run(["--model-type", "GPT", "--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "mg",
                "--lora-load", tmp_path / "lora", "--lora-r", "4", "--lora-alpha", "6", "--lora-target-modules", "linear_qkv",
                "linear_proj", "linear_fc1", "linear_fc2", "--target-tensor-parallel-size", "1", "--save-dir", tmp_path / "hf"])
    assert done.returncode == 0, done.stderr
    assert equal(tensors_of(open_checkpoint(tmp_path / "hf")), wanted)


def test_an_adapter_alone_without_its_scale(made: Any, tmp_path: Path) -> None:
    tensors = made("llama")
    base = open_checkpoint(tmp_path / "base")
    original({}, tensors, tmp_path / "lora", everything=False)
    path = next((tmp_path / "lora").rglob("*.pt"))
    torch.save(load_state(path) | {"args": None}, path)
    with pytest.raises(ModelLinkError, match="are not recorded"):
        open_adapter(tmp_path / "lora", base)
    assert open_adapter(tmp_path / "lora", base, alpha=8).adapter == AdapterConfig(4, 8)
    half = {name: tensor for name, tensor in tensors.items() if name != next(iter(tensors))}
    original({}, half, tmp_path / "half", everything=False)
    with pytest.raises(ModelLinkError, match="1 weight is not part of this model"):
        open_adapter(tmp_path / "half", base)
