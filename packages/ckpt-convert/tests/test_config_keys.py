# SPDX-License-Identifier: Apache-2.0
"""No key of a config.json is ignored in silence, and a missing key means what transformers' class means by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modellink.ckpt_convert.families import family_names, family_of, read_spec
from modellink.ckpt_convert.hf_config import INERT, Config
from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is no need of this package")
CLASSES = [name for name in family_names() if name in transformers.CONFIG_MAPPING]
BASE = transformers.PreTrainedConfig().to_dict()
GEMMA2 = {"head_dim": 8, "hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2,
          "num_hidden_layers": 4, "vocab_size": 131, "sliding_window": 7}


def defaults(name: str) -> dict[str, Any]:
    """Return the configuration of transformers' class with all keys."""
    values: dict[str, Any] = transformers.CONFIG_MAPPING[name]().to_dict()
    if name == "deepseek_v2":
        values["num_experts_per_tok"] = 6  # the class has no default
    if name == "qwen2_moe":
        values["sliding_window"] = None  # written as 0 for none
    return values


def spec_of(name: str, values: dict[str, Any]) -> ModelSpec:
    config = Config(values | {"model_type": name}, Path("config.json"))
    spec, _ = read_spec(config)
    assert not config.unread(family_of(name).inert)
    return spec


def changed(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 2
    if isinstance(value, dict):
        return value | {"rope_theta": 12345.0}
    return [f"other {entry}" for entry in value] or ["other"] if isinstance(value, list) else f"other {value}"


def test_there_are_classes_to_compare_with() -> None:
    assert {"llama", "gemma2", "qwen2", "deepseek_v2", "gpt2"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_the_class_is_read_or_known_to_be_inert(name: str) -> None:
    full = defaults(name)
    spec = spec_of(name, full)
    inert = INERT | set(family_of(name).inert)
    for key in full.keys() - BASE.keys() - inert:
        try:
            other = spec_of(name, full | {key: changed(full[key])})
        except ModelLinkError:
            continue  # refused
        assert other != spec, f"{key} has no effect"


@pytest.mark.parametrize("name", CLASSES)
def test_a_missing_key_has_the_default_of_the_class_or_is_refused(name: str) -> None:
    full = defaults(name)
    spec = spec_of(name, full)
    for key in full:
        try:
            short = spec_of(name, {other: value for other, value in full.items() if other != key})
        except ModelLinkError:
            continue  # required
        assert not spec.differences(short), key


@pytest.mark.parametrize("kinds", [[True, True, False, True], [False] * 4])
def test_gemma2_obeys_layer_types(kinds: list[bool]) -> None:
    types = ["sliding_attention" if kind else "full_attention" for kind in kinds]
    config = transformers.CONFIG_MAPPING["gemma2"](**GEMMA2, layer_types=types).to_dict()
    spec = spec_of("gemma2", config)
    assert [layer.window for layer in spec.layers] == [7 if kind else None for kind in kinds]
    assert spec_of("gemma2", family_of("gemma2").write(spec)) == spec
    usual = spec_of("gemma2", transformers.CONFIG_MAPPING["gemma2"](**GEMMA2).to_dict())
    assert [layer.window for layer in usual.layers] == [7, None, 7, None] and usual.layer_windows is None


@pytest.mark.parametrize("value", [["other"] * 4, ["full_attention"], "full_attention"])
def test_layer_types_that_are_not_known_are_refused(value: object) -> None:
    with pytest.raises(ModelLinkError, match="layer_types"):
        spec_of("gemma2", transformers.CONFIG_MAPPING["gemma2"](**GEMMA2).to_dict() | {"layer_types": value})


def test_an_unknown_key_is_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        read_spec(Config(json.loads(json.dumps(defaults("llama"))) | {"use_ring_norm": True}, Path("ring/config.json")))
    assert capsys.readouterr().err.count("ring/config.json, which have no effect here: use_ring_norm") == 1
