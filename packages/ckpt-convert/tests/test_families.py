# SPDX-License-Identifier: Apache-2.0
"""Configurations in both spellings, errors about unsupported ones, and rules that map every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink.ckpt_convert import ModelSpec, families, open_checkpoint
from modellink.ckpt_convert.families import family_of, read_spec
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import HFRows, inverse
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import InternalError, ModelLinkError

Make = Callable[..., Path]
SPEC = ModelSpec(num_layers=2, hidden_size=20, num_attention_heads=6, num_query_groups=3, kv_channels=8, ffn_hidden_size=36,
                 vocab_size=131)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def spec_of(family: str, **changes: Any) -> ModelSpec:
    values = family_of(family).write(SPEC if family == "llama" else ModelSpec(**SPEC.to_dict() | {"add_qkv_bias": True}))
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    return read_spec(Config(values, Path("config.json")))[0]


def test_both_spellings_of_rotary_parameters_agree() -> None:
    four = spec_of("llama", rope_theta=500000.0, rope_scaling=LLAMA3)
    five = spec_of("llama", rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 500000.0, **LLAMA3})
    assert four == five
    assert (four.rotary_base, four.rope_scaling_type, four.rope_scaling_factor) == (500000.0, "llama3", 8.0)
    assert spec_of("llama", rope_theta=..., rope_scaling=None).rotary_base == 10000.0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_config_made_from_a_spec_reads_back(family: str) -> None:
    spec = ModelSpec(**SPEC.to_dict() | {"add_qkv_bias": family == "qwen2", "rope_scaling_type": "llama3",
                                         "rope_scaling_factor": 8.0, "original_max_position_embeddings": 8192})
    assert read_spec(Config(family_of(family).write(spec), Path("config.json"))) == (spec, family)


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("llama", {"hidden_act": "relu"}, "hidden_act"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'factor' is missing"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
    ("llama", {"hidden_size": ...}, "'hidden_size' is missing"),
    ("llama", {"num_hidden_layers": "many"}, "'num_hidden_layers' is 'many'"),
    ("llama", {"num_attention_heads": 0}, "'num_attention_heads' is 0"),
    ("llama", {"model_type": ..., "architectures": ["SomethingElse"]}, "'model_type' is missing"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
])
def test_what_is_not_supported_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLinkError, match=message) as caught:
        spec_of(family, **changes)
    assert "config.json" in str(caught.value)


def test_an_unknown_model_type_names_near_ones() -> None:
    with pytest.raises(ModelLinkError, match=r"unknown model type 'qwenn2'[\s\S]*did you mean qwen2\?"):
        spec_of("llama", model_type="qwenn2")  # although `architectures` names a known class


def test_a_missing_key_names_the_families_that_would_do() -> None:
    with pytest.raises(ModelLinkError, match=r"'num_layers' is missing.*family chatglm[\s\S]*all their keys in it:.* llama"):
        spec_of("llama", model_type="chatglm")


def test_tensors_of_another_family_name_it(make_model: Make) -> None:
    folder = make_model("qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "use_sliding_window": False}))
    with pytest.raises(ModelLinkError, match=r"are not part of this model: .*q_proj.bias[\s\S]*read as llama.*family qwen2"):
        open_checkpoint(folder)


def test_a_family_that_the_user_names() -> None:
    config = Config(family_of("llama").write(SPEC) | {"model_type": "unheard"}, Path("config.json"))
    assert read_spec(config, "llama") == (SPEC, "llama")
    assert read_spec(config, "llama2") == (SPEC, "llama")  # the original's name for all models with these tensor names
    with pytest.raises(ModelLinkError, match="of the family llama, not qwen2"):
        read_spec(Config(family_of("llama").write(SPEC), Path("config.json")), "qwen2")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_rules_use_every_row_once(family: str, tied: bool) -> None:
    spec = ModelSpec(**SPEC.to_dict() | {"add_qkv_bias": True, "add_dense_bias": family == "llama",
                                         "untie_embeddings_and_output_weights": not tied})
    targets = inverse(spec, family_of(family).rules(spec))
    used: dict[str, list[int]] = {name: [] for name in weights(spec)}
    for target in targets.values():
        for name, rows in target.rows:
            used[name] += rows
    assert all(sorted(rows) == list(range(weights(spec)[name].shape[0])) for name, rows in used.items())
    assert targets["model.layers.1.self_attn.k_proj.weight"].shape == (24, 20)


@pytest.mark.parametrize("damage", ["missing", "twice", "never"])
def test_rules_that_are_not_total_are_caught(damage: str) -> None:
    rules = family_of("llama").rules(SPEC)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    if damage == "missing":
        del rules[name]
    elif damage == "twice":
        rules[name] = rules["decoder.final_layernorm.weight"]
    else:
        rules[name] = [HFRows("model.layers.0.mlp.down_proj.weight", range(1, 21))]
    with pytest.raises(InternalError):
        inverse(SPEC, rules)


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def test_weights_that_are_missing_or_left_over_are_listed(make_model: Make) -> None:
    folder = make_model("llama")
    change(folder, model__layers__0__rotary_emb__inv_freq=torch.zeros(4))
    open_checkpoint(folder)  # a known, harmless buffer
    change(folder, model__layers__1__self_attn__q_norm__weight=torch.zeros(8))
    with pytest.raises(ModelLinkError, match=r"1 weight is not part of this model: model.layers.1.self_attn.q_norm.weight"):
        open_checkpoint(folder)
    change(folder, model__layers__1__self_attn__q_norm__weight=None, model__norm__weight=None, lm_head__weight=None)
    with pytest.raises(ModelLinkError, match=r"2 weights are missing: model.norm.weight, lm_head.weight"):
        open_checkpoint(folder)


def test_a_wrong_shape_names_tensor_and_file(make_model: Make) -> None:
    folder = make_model("llama")
    change(folder, model__norm__weight=torch.zeros(21))
    with pytest.raises(ModelLinkError, match=r"model.norm.weight has the shape \[21\].*\[20\][\s\S]*model.safetensors"):
        open_checkpoint(folder)


def test_a_tied_model_that_carries_its_embedding_twice(make_model: Make) -> None:
    folder = make_model("qwen2", tie_word_embeddings=True)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table.clone())
    open_checkpoint(folder)
    change(folder, lm_head__weight=table + 1)
    with pytest.raises(ModelLinkError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        open_checkpoint(folder)


def test_quantized_weights_are_refused(make_model: Make) -> None:
    folder = make_model("llama")
    change(folder, model__norm__weight=torch.zeros(20, dtype=torch.int8))
    with pytest.raises(ModelLinkError, match="stored as I8"):
        open_checkpoint(folder)


def test_deepseek_normalizes_or_scales_and_has_its_own_epsilon_in_latent_norms() -> None:
    """As in the authors' modeling_deepseek.py: MoEGate scales only what it does not normalize."""
    record = json.loads((Path(__file__).parent / "public/deepseek-v2.json").read_text())["config"]

    def read(**changes: Any) -> ModelSpec:
        return read_spec(Config(record | changes, Path("config.json")))[0]
    assert (read().moe_router_pre_softmax, read().routed_scaling_factor) == (True, 16.0)
    several = read(norm_topk_prob=True)
    assert (several.moe_router_pre_softmax, several.routed_scaling_factor) == (False, 1.0)
    single = read(norm_topk_prob=True, num_experts_per_tok=1)
    assert (single.moe_router_pre_softmax, single.routed_scaling_factor) == (True, 16.0)
    assert read().layer(0).latent_norm_epsilon == 1e-6
    other = read(rms_norm_eps=1e-5)
    assert (other.norm_epsilon, other.layer(0).latent_norm_epsilon) == (1e-5, 1e-6)
    assert read_spec(Config(family_of("deepseek_v2").write(other), Path("config.json")))[0] == other


def test_minicpm_without_a_base_width_has_the_default_of_its_class() -> None:
    record = json.loads((Path(__file__).parent / "public/minicpm-2b.json").read_text())["config"]
    short = {key: value for key, value in record.items() if key != "dim_model_base"}
    assert read_spec(Config(record, Path("config.json")))[0].output_multiplier_scale == 256 / 2304
    assert read_spec(Config(short, Path("config.json")))[0].output_multiplier_scale == 1 / 2304


def test_families_stay_small() -> None:
    for path in Path(families.__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            assert len(path.read_text().splitlines()) <= 71, path  # 70 and the license identifier
