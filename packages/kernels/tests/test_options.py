# SPDX-License-Identifier: Apache-2.0
"""Options, YAML and documentation from a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from modellink.kernels.command import command
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, describe, option, resolve, yaml_layer


@dataclass(frozen=True)
class Config:
    train_iters: int = option(doc="Iterations.", minimum=1)
    lr: float = option(1e-4, "Learning rate.", minimum=0, maximum=1)
    shuffle: bool = option(True, "Mix the samples.")
    style: Literal["linear", "cosine"] = option("linear", "Decay.")
    data_path: tuple[str, ...] = option((), "Data.")
    layer_list: tuple[int, ...] | None = option(None, "Layers.", alias="--ll")
    save: Path | None = option(None, "Folder.", unit="a folder")


def given(*args: str) -> dict[str, object]:
    found = {}

    @command(Config)
    def run(given: Layer) -> None:
        found.update(given.values)

    result = CliRunner().invoke(run, args)
    assert result.exit_code == 0, result.output
    return found


def resolved(*layers: Layer) -> Config:
    return resolve([Config], *layers)[Config]


def test_only_what_was_given_is_in_the_layer():
    assert given() == {}
    assert given("--lr", "0.5", "--no-shuffle") == {"lr": "0.5", "shuffle": False}


def test_an_option_of_many_takes_all_until_the_next():
    assert given("--data-path", "0.3", "a", "-0.7", "b", "--lr", "1") == {"data_path": ("0.3", "a", "-0.7", "b"), "lr": "1"}


def test_an_option_of_many_is_also_spelt_with_underscores():
    assert given("--train-iters", "3", "--data_path", "a", "b")["data_path"] == ("a", "b")


def test_aliases_and_underscores_are_the_same_option():
    assert given("--ll", "1,2")["layer_list"] == given("--layer_list", "1,2")["layer_list"] == ("1,2",)


def test_values_get_their_types():
    config = resolved(Layer("x", {"train_iters": "3", "lr": "1e-3", "layer_list": ("4,6", "2"), "save": "a/b"}))
    assert config == Config(train_iters=3, lr=1e-3, layer_list=(4, 6, 2), save=Path("a/b"))


def test_a_later_layer_wins_and_every_value_knows_its_source():
    done = resolve([Config], Layer("preset", {"lr": 0.1, "train_iters": 1}), Layer("run.yaml", {"lr": 0.2}))
    assert done[Config].lr == 0.2
    assert (done.sources["lr"], done.sources["train_iters"], done.sources["style"]) == ("run.yaml", "preset", "default")


@pytest.mark.parametrize(("values", "message"), [
    ({"train_itres": 1}, "unknown key 'train_itres'"),
    ({"train_iters": 0}, "must be at least 1"),
    ({"train_iters": 1.5}, "must be a whole number"),
    ({"train_iters": "ten"}, "must be a whole number"),
    ({"train_iters": True}, "must be a whole number"),
    ({"train_iters": 1, "shuffle": "no"}, "must be true or false"),
    ({"train_iters": 1, "style": "step"}, "one of linear, cosine"),
    ({"train_iters": 1, "lr": 2}, "at least 0 and at most 1"),
    ({"lr": 0.1}, "--train-iters is required"),
])
def test_a_wrong_value_is_refused_with_its_source(values, message):
    with pytest.raises(ModelLinkError, match=message) as caught:
        resolved(Layer("run.yaml", values))
    assert "run.yaml" in str(caught.value) or "is required" in message


def test_choices_are_also_spelled_with_underscores():
    @dataclass(frozen=True)
    class Format:
        format: Literal["hf", "torch-dist"] = option("hf", "Format.")

    assert resolve([Format], Layer("x", {"format": "torch_dist"}))[Format].format == "torch-dist"
    with pytest.raises(ModelLinkError) as caught:
        resolve([Format], Layer("x", {"format": "distcp"}))
    assert caught.value.fix == "did you mean torch-dist?" and caught.value.option == "format"


def test_a_misspelt_key_names_what_was_meant():
    with pytest.raises(ModelLinkError) as caught:
        resolved(Layer("run.yaml", {"train_itres": 1}))
    assert "did you mean train_iters?" in str(caught.value)


def test_yaml_is_flat_or_grouped(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {train-iters: 7}\nlr: 0.5\ndata:\n  data_path: [a, b]\n")
    assert resolved(yaml_layer(path)) == Config(train_iters=7, lr=0.5, data_path=("a", "b"))


@pytest.mark.parametrize("text", ["a: [", "train_iters: 1\noptimizer: {train_iters: 2}\n", "- 1\n"])
def test_yaml_that_cannot_be_meant_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ModelLinkError) as caught:
        yaml_layer(path)
    assert str(path) in str(caught.value)


def test_help_and_documentation_say_default_and_unit():
    @command(Config)
    def run(given: Layer) -> None: ...

    text = " ".join(CliRunner().invoke(run, ["--help"]).output.split())
    assert "--shuffle / --no-shuffle Mix the samples. [default: on]" in text
    assert "Iterations. [required]" in text
    assert "| `--layer-list`, `--ll` |  | Layers. |" in describe(Config)
    assert "| `--lr` | `0.0001` | Learning rate. |" in describe(Config)
