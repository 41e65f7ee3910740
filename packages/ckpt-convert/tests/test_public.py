# SPDX-License-Identifier: Apache-2.0
"""Every recorded public configuration is accepted, is unchanged when written again, and has the expected tensors.

The expected names and shapes are files next to the records, made by `public/make_tensors.py` from another source than this
package; neither transformers nor a reference model is needed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensor_lists import COMPLETED, PUBLIC, REFUSED, fold, unfold

from modellink.ckpt_convert.families import family_of, read_spec
from modellink.ckpt_convert.family import config_of
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.rules import inverse
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError

RECORDS = sorted(path.stem for path in PUBLIC.glob("*.json"))
ACCEPTED = [name for name in RECORDS if name not in REFUSED]


def record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((PUBLIC / f"{name}.json").read_text(encoding="utf-8"))
    return content


def config(name: str) -> Config:
    return Config(record(name)["config"] | COMPLETED.get(name, {}), Path(f"{name}.json"))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_configuration_written_again_means_the_same(name: str) -> None:
    spec, family = read_spec(config(name))
    spec.check()
    again = Config(config_of(family_of(family), spec), Path("config.json"))
    back, same_family = read_spec(again)
    assert same_family == family
    assert not spec.differences(back)


@pytest.mark.parametrize("name", ACCEPTED)
def test_its_tensors_are_those_of_another_source(name: str) -> None:
    spec, family = read_spec(config(name))
    expected = unfold((PUBLIC / "tensors" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[1:])
    targets = inverse(spec, family_of(family).rules(spec))
    assert {key: target.shape for key, target in targets.items()} == expected
    used: dict[str, int] = dict.fromkeys(weights(spec), 0)
    for target in targets.values():
        for canonical, rows in target.rows:
            used[canonical] += len(rows)
    assert used == {canonical: weight.shape[0] for canonical, weight in weights(spec).items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_of_no_family_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelLinkError, match=f"unknown model type '{REFUSED[name]}'"):
        read_spec(config(name))


def test_only_unverified_records_are_completed_and_only_with_what_they_lack() -> None:
    for name, keys in COMPLETED.items():
        assert not record(name)["verified"] and not keys.keys() & record(name)["config"].keys()


def test_every_record_has_its_list_and_every_list_its_record() -> None:
    assert sorted(path.stem for path in (PUBLIC / "tensors").glob("*.txt")) == ACCEPTED


def test_folding_loses_nothing() -> None:
    shapes = {f"a.{layer}.b.{expert}.c": (2, 3) for layer in (1, 2) for expert in range(3)} | {"d.weight": (5,)}
    assert fold(shapes) == ["a.{1-2}.b.{0-2}.c [2, 3]", "d.weight [5]"]
    assert unfold(fold(shapes)) == shapes
    with pytest.raises(AssertionError, match="gaps"):
        fold({"a.0.b": (1,), "a.2.b": (1,)})


@pytest.mark.parametrize("name", ACCEPTED)
def test_no_key_of_a_public_configuration_is_unknown(name: str) -> None:
    found = config(name)
    _, family = read_spec(found)
    limits = {"use_dynamic_ntk", "use_logn_attn"} if family == "qwen" else set()
    assert set(found.unread(family_of(family).inert)) <= limits
