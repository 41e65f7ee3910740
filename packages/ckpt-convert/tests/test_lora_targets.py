# SPDX-License-Identifier: Apache-2.0
"""Names of LoRA modules: the spellings of Megatron-Core, Megatron-Legacy and Hugging Face, and what a wrong one means."""

from __future__ import annotations

import pytest
from tiny_models import spec_of

from modellink.ckpt_convert.lora_targets import check_targets, meant_modules, modules_of
from modellink.kernels.errors import ModelLinkError

MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
QKV = ["decoder.layers.0.self_attention.linear_qkv.lora_A.weight", "decoder.layers.0.self_attention.linear_qkv.lora_B.weight"]


@pytest.mark.parametrize(("name", "meant"), [
    ("q_proj", "linear_qkv"), ("o_proj", "linear_proj"), ("up_proj", "linear_fc1"), ("down_proj", "linear_fc2"),
    ("query_key_value", "linear_qkv"), ("dense_4h_to_h", "linear_fc2"), ("linear_qvk", "linear_qkv"),
    ("c_proj", "linear_proj or linear_fc2?"), ("all-linear", "linear_qkv linear_proj linear_fc1 linear_fc2?")])
def test_what_a_name_means(name: str, meant: str) -> None:
    assert meant_modules(name, MODULES).startswith(f"did you mean {meant}")


def test_only_allowed_names_are_suggested() -> None:
    assert meant_modules("zzz", MODULES) == ""
    assert meant_modules("c_proj", ["linear_fc2"]) == "did you mean linear_fc2?"


def test_names_of_a_models_own_class() -> None:
    family, spec = spec_of("gpt2")
    assert modules_of(spec, family)["c_attn"] == ("linear_qkv",)
    family, spec = spec_of("deepseek_v2")
    known = ["linear_q_up_proj", "linear_kv_up_proj", "linear_fc1"]
    assert meant_modules("kv_b_proj", known, spec, family) == "did you mean linear_kv_up_proj?"


def test_checking_an_adapters_modules() -> None:
    check_targets(QKV, [])
    check_targets(QKV, ["linear_qkv"])
    check_targets(QKV, ["query_key_value"])
    with pytest.raises(ModelLinkError) as caught:
        check_targets(QKV, ["q_proj"])
    assert caught.value.fix == "did you mean linear_qkv?" and caught.value.option == "lora_target_modules"
