# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: peft folders written and read for every family, compared with peft itself, and merging by the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import CONFIG, adapter_of, equal
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, make_folder, spec_of

from modellink.ckpt_convert import iter_hf_tensors, open_checkpoint
from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.lora import A, B, merge_lora
from modellink.ckpt_convert.peft import read_peft, write_peft
from modellink.ckpt_convert.weights import OUTPUT
from modellink.kernels.errors import ModelLinkError

QKV = "decoder.layers.1.self_attention.linear_qkv"


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read(name: str, tmp_path: Path) -> None:
    family, spec = spec_of(name)
    tensors = adapter_of(spec)
    write_peft(tmp_path / "adapter", spec, family, tensors, CONFIG)
    config, found = read_peft(tmp_path / "adapter", spec, family)
    assert config == CONFIG and equal(found, tensors)


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_what_peft_does_to_the_hugging_face_weights(name: str, tmp_path: Path) -> None:
    """Module by module from the folder only: the rows of fused matrices are mapped like those of the weights."""
    family, spec = spec_of(name)
    theirs = make_folder(tmp_path / "base", family, spec, torch.float32)
    tensors = adapter_of(spec)
    write_peft(tmp_path / "adapter", spec, family, tensors, CONFIG)
    folder = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = dict(iter_hf_tensors(merge_lora(open_checkpoint(tmp_path / "base"), CONFIG, tensors)))
    transposed = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    changed = 0
    for module in (key.removesuffix(".weight") for key in theirs):
        delta = torch.zeros(())
        if f"base_model.model.{module}{A}" in folder:
            first, second = (folder[f"base_model.model.{module}{side}"] for side in (A, B))
            delta, changed = 1.5 * (second @ first), changed + 1
            delta = delta.T if transposed else delta
        key = module if module in theirs else module + ".weight"
        torch.testing.assert_close(merged[key], theirs[key] + delta, rtol=1e-5, atol=1e-5)
    assert changed == len(folder) // 2


def test_merging_is_rounded_once_and_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    family, spec = spec_of("llama", hidden_size=200, ffn_hidden_size=333)
    make_folder(tmp_path / "base", family, spec, torch.bfloat16)
    base, tensors = open_checkpoint(tmp_path / "base"), adapter_of(spec)
    merged = merge_lora(base, CONFIG, tensors)
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    rows = range(666)
    whole = merged.read(name, [rows], 0)
    module = name.removesuffix(".weight")
    exact = base.read(name, [rows], 0).double() + 1.5 * (tensors[module + B].double() @ tensors[module + A].double())
    assert whole.dtype == torch.bfloat16 and bool(((whole - exact).abs() <= 2 ** -8 * exact.abs() + 1e-6).all())
    pieces = [range(70, 75), range(3, 69), range(600, 666)]
    assert torch.equal(merged.read(name, pieces, 0, range(5, 50)), torch.cat([whole[p.start:p.stop, 5:50] for p in pieces]))
    pieces = [range(70, 75), range(3, 69)]
    assert torch.equal(merged.read(name, pieces, 1, range(5, 500)), torch.cat([whole[5:500, p.start:p.stop] for p in pieces], 1))
    assert torch.equal(merged.read(OUTPUT, [range(131)], 0), base.read(OUTPUT, [range(131)], 0))


def folder_of(path: Path, modules: dict[str, tuple[int, ...]], **config: Any) -> dict[str, torch.Tensor]:
    """Write a peft folder with different As for modules -> (rank, out, in)."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for module, (rank, out, into) in modules.items():
        tensors[f"base_model.model.{module}{A}"] = torch.randn(rank, into, generator=generator)
        tensors[f"base_model.model.{module}{B}"] = torch.randn(out, rank, generator=generator)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6} | config))
    return tensors


def llama_modules(rank: int = 4, names: str = "qkv") -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.self_attn.{name}_proj": (rank, {"q": 48, "k": 24, "v": 24}[name], 20)
            for layer in range(4) for name in names}


@pytest.mark.parametrize("names", ["qkv", "qv", "k"])
def test_modules_with_their_own_first_matrix_become_blocks(names: str, tmp_path: Path) -> None:
    family, spec = spec_of("llama")
    theirs = folder_of(tmp_path / "theirs", llama_modules(names=names))
    config, tensors = read_peft(tmp_path / "theirs", spec, family)
    assert tensors[QKV + A].shape == (4 * len(names), 20) and tensors[QKV + B].shape == (96, 4 * len(names))
    assert (tensors[QKV + B] != 0).sum() == 4 * sum({"q": 48, "k": 24, "v": 24}[name] for name in names)
    product = tensors[QKV + B] @ tensors[QKV + A]
    group = {"q": range(24, 36), "k": range(36, 42), "v": range(42, 48)}  # the second of four groups: two queries, key, value
    for name in "qkv":
        start = "base_model.model.model.layers.1.self_attn."
        rows = slice(12, 24) if name == "q" else slice(6, 12)
        wanted = (theirs[f"{start}{name}_proj{B}"][rows] @ theirs[f"{start}{name}_proj{A}"] if name in names
                  else torch.zeros(len(group[name]), 20))
        torch.testing.assert_close(product[group[name].start:group[name].stop], wanted)
    write_peft(tmp_path / "again", spec, family, tensors, config)
    assert equal(load_file(tmp_path / "again" / "adapter_model.safetensors"), theirs)


def test_a_fused_adapter_that_was_trained_further_keeps_its_rank_and_scale(tmp_path: Path) -> None:
    family, spec = spec_of("llama")
    folder_of(tmp_path / "theirs", llama_modules())
    config, tensors = read_peft(tmp_path / "theirs", spec, family)
    tensors[QKV + B] = tensors[QKV + B] + 1
    write_peft(tmp_path / "ours", spec, family, tensors, config)
    values = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    name = "model.layers.1.self_attn.q_proj"
    assert values["rank_pattern"][name] == 12 and values["alpha_pattern"][name] == 18 and len(values["rank_pattern"]) == 3
    assert read_peft(tmp_path / "ours", spec, family)[0] == config
    assert equal(read_peft(tmp_path / "ours", spec, family)[1], tensors)


def test_an_adapter_that_has_learned_nothing_keeps_all_modules(tmp_path: Path) -> None:
    family, spec = spec_of("llama")
    tensors = {name: torch.zeros_like(tensor) if name.endswith(B) else tensor for name, tensor in adapter_of(spec).items()}
    write_peft(tmp_path / "fresh", spec, family, tensors, CONFIG)
    assert equal(read_peft(tmp_path / "fresh", spec, family)[1], tensors)


@pytest.mark.parametrize(("change", "message"), [
    ({"use_dora": True}, "use_dora is True"), ({"bias": "all"}, "bias is 'all'"), ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"init_lora_weights": "pissa"}, "pissa"), ({"r": 8}, "by the configuration the rank is 8"), ({"r": 0}, "r is 0"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"alpha_pattern": {"k_proj": 12}}, "k_proj is scaled by 3"),
    ({"rank_pattern": {"(.*)*x": 4}}, "is a regular expression")])
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    family, spec = spec_of("llama")
    folder_of(tmp_path / "theirs", llama_modules(), **change)
    with pytest.raises(ModelLinkError, match=message.replace("(", "\\(")):
        read_peft(tmp_path / "theirs", spec, family)


@pytest.mark.parametrize(("modules", "message"), [
    ({"model.layers.0.self_attn.x_proj": (4, 48, 20)}, "x_proj"), ({"model.layers.0.self_attn.q_proj": (4, 47, 20)}, "shape"),
    ({"model.layers.9.self_attn.q_proj": (4, 48, 20)}, "layers.9"), ({"model.layers.0.self_attn.q_proj": (4, 48, 21)}, "shape")])
def test_an_adapter_of_another_model_is_refused(modules: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    family, spec = spec_of("llama")
    folder_of(tmp_path / "theirs", modules)
    with pytest.raises(ModelLinkError, match=message):
        read_peft(tmp_path / "theirs", spec, family)


@pytest.fixture
def base(make_model: Callable[..., Path]) -> tuple[Any, Any, Path]:
    """(peft, transformers, folder of a tiny Llama in fp32)."""
    peft = pytest.importorskip("peft", reason="peft is not installed; it is no need of this package")
    return peft, pytest.importorskip("transformers"), make_model("llama", hidden_size=24)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(1, 12)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours(rslora: bool, base: tuple[Any, Any, Path], tmp_path: Path) -> None:
    peft, transformers, folder = base
    source, config = open_checkpoint(folder), AdapterConfig(4, 6.0, rslora=rslora)
    tensors = adapter_of(source.spec, scale=0.2)
    write_peft(tmp_path / "adapter", source.spec, source.family, tensors, config, base=str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = logits(model)
    adapted = logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    merged.load_state_dict(dict(iter_hf_tensors(merge_lora(source, config, tensors))))
    torch.testing.assert_close(adapted, logits(merged), rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]])
def test_we_load_what_peft_saved(targets: list[str], base: tuple[Any, Any, Path], tmp_path: Path) -> None:
    peft, transformers, folder = base
    source = open_checkpoint(folder)
    torch.manual_seed(3)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", rank_pattern={"layers.1.self_attn.v_proj": 6},
        alpha_pattern={"layers.1.self_attn.v_proj": 10}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    config, tensors = read_peft(tmp_path / "theirs", source.spec, source.family)
    write_peft(tmp_path / "again", source.spec, source.family, tensors, config)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert equal(theirs, ours)
    merged = dict(iter_hf_tensors(merge_lora(source, config, tensors)))
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)
