# SPDX-License-Identifier: Apache-2.0
"""The presets: complete, legal, cut as their layout says, as large as published; what `modellink-train models` prints of them.

Not here: that megatron-core builds them (test_preset_builds.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from modellink.ckpt_convert.families import read_spec
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import parameters
from modellink.core.config import CheckpointConfig, DataConfig, OptimizerConfig, ParallelConfig
from modellink.core.models import COLUMNS, commands, models
from modellink.core.presets import load_preset, preset_names
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import fields_of
from modellink.kernels.parallel import padded_vocab_size

SECTIONS = {"model": ModelSpec, "parallel": ParallelConfig, "data": DataConfig, "optimizer": OptimizerConfig}
ORIGINAL = {"implementation", "cluster", "tokens_per_second", "switches"}
COMMANDS = {"modellink-convert": ("modellink.ckpt_convert.cli", "modellink_convert"),
            "modellink-preprocess": ("modellink.data_prep.cli", "preprocess_command"),
            "modellink-train": ("modellink.core.cli", "train"), "modellink-infer": ("modellink.infer.cli", "infer"),
            "modellink-eval": ("modellink.eval.cli", "evaluation")}
PUBLIC = Path(__file__).parents[2] / "ckpt-convert/tests/public"
COUNTS = yaml.safe_load(Path(__file__).with_name("parameter_counts.yaml").read_text(encoding="utf-8"))

every = pytest.mark.parametrize("name", preset_names())


def test_every_row_of_the_original_is_there_once() -> None:
    presets = [load_preset(name) for name in preset_names()]
    assert [preset.row for preset in presets] == list(range(1, 77))
    assert all(re.fullmatch(r"[a-z0-9.-]+-\d+k", preset.name) for preset in presets)


@every
def test_a_preset_is_made_of_legal_options(name: str) -> None:
    preset = load_preset(name)
    for section, config in SECTIONS.items():
        fields = {field.name: field for field in fields_of(config)}
        for option, value in getattr(preset, section).items():
            fields[option].convert(value, preset.name)  # raises where the value is not legal
            assert not isinstance(value, str) or isinstance(fields[option].kind, tuple), f"{option}: {value!r} is a text"
    assert {"bf16", "fp16"} >= set(preset.optimizer) and list(preset.optimizer.values()) == [True]
    layer = preset.layer()
    assert layer.source == f"preset {name}"
    assert dict(preset.model) | dict(preset.parallel) | dict(preset.data) | dict(preset.optimizer) == {
        option: value for option, value in layer.values.items() if option != "model_type_hf"}
    assert layer.values["model_type_hf"] == (preset.family or "none")
    assert "model_type_hf" in {field.name for field in fields_of(CheckpointConfig)}


@every
def test_a_preset_says_what_it_comes_from(name: str) -> None:
    preset = load_preset(name)
    assert set(preset.original) <= ORIGINAL and preset.original["implementation"] in ("Mcore", "Legacy")
    assert preset.original["tokens_per_second"] > 0
    assert (preset.public is None) == (preset.public_missing is not None)
    assert all(isinstance(note, str) and note.endswith(".") for note in preset.notes)


@every
def test_a_preset_is_the_public_model_it_names(name: str) -> None:
    preset = load_preset(name)
    if preset.public is None:
        pytest.skip(str(preset.public_missing))
    record = json.loads((PUBLIC / f"{preset.public}.json").read_text(encoding="utf-8"))
    if not record["verified"]:
        pytest.skip("its public configuration is not recorded in full")
    spec, family = read_spec(Config(record["config"], Path(preset.public)))
    assert family == preset.family
    assert set(preset.spec.differences(spec)) <= {"max_position_embeddings", "original_max_position_embeddings"}


@every
def test_a_preset_can_be_cut_as_it_says(name: str) -> None:
    preset = load_preset(name)
    spec, layout, seq = preset.spec, preset.layout, preset.data["seq_length"]
    spec.check()
    spec.check_layout(layout)
    assert seq <= spec.max_position_embeddings
    assert seq % layout.tp == 0 and seq % (2 * layout.cp) == 0
    assert (layout.dp * layout.cp) % layout.ep == 0, "expert parallel ranks are among the data- and context-parallel ones"
    assert preset.parallel.get("sequence_parallel", False) == (layout.tp > 1)
    passes, rest = divmod(preset.data["global_batch_size"], preset.data["micro_batch_size"] * layout.dp)
    assert passes > 0 and rest == 0
    assert layout.vpp == 1 or passes % layout.pp == 0
    rows = padded_vocab_size(spec.vocab_size, layout.tp, preset.parallel["make_vocab_size_divisible_by"])
    assert rows == (51200 if spec.vocab_size == 50257 else spec.vocab_size)


def test_two_rows_need_more_devices_than_the_originals_table_gives_them() -> None:
    short = [preset.row for preset in map(load_preset, preset_names()) if preset.layout.world_size > preset.devices]
    assert short == [19, 62]  # the table says 1x8 and 8x8, the scripts' layouts take 16 and 128


def test_an_unknown_name_is_one_sentence_with_near_names() -> None:
    with pytest.raises(ModelLinkError) as caught:
        load_preset("Qwen2.5-7B")
    assert str(caught.value).splitlines()[0] == "there is no preset 'Qwen2.5-7B'"
    assert caught.value.fix is not None and "qwen2.5-7b-32k" in caught.value.fix
    with pytest.raises(ModelLinkError, match="there is no preset"):
        load_preset("nonsense")


@pytest.mark.parametrize("counted", COUNTS, ids=lambda counted: counted["presets"][0])
def test_a_preset_is_as_large_as_published(counted: dict[str, Any]) -> None:
    for name in counted["presets"]:
        spec = load_preset(name).spec
        if "num_layers" in counted:
            spec = dataclasses.replace(spec, num_layers=counted["num_layers"])
        if counted["parameters"] is not None:
            assert abs(parameters(spec) / counted["parameters"] - 1) <= counted.get("within", 0), f"{name}: {parameters(spec)}"


def test_every_preset_is_counted_once() -> None:
    assert sorted(name for counted in COUNTS for name in counted["presets"]) == sorted(preset_names())
    assert all(counted["source"] for counted in COUNTS)


def test_the_table_has_a_line_a_preset() -> None:
    lines = CliRunner().invoke(models, [], catch_exceptions=False).stdout.splitlines()
    assert lines[0].split() == list(COLUMNS)
    assert [line.split()[0] for line in lines[1:]] == preset_names()
    assert {"7.62B", "32768", "4", "2", "1/16", "1x8", "2177"} <= set(lines[1 + preset_names().index("qwen2.5-7b-32k")].split())
    listed = json.loads(CliRunner().invoke(models, ["--json"], catch_exceptions=False).stdout)
    assert [entry["name"] for entry in listed] == preset_names()
    assert listed[0]["parameters"] > 7e9 and listed[0]["layout"]["tp"] == 8


@every
def test_a_preset_is_shown_with_its_notes_and_commands(name: str) -> None:
    shown = CliRunner().invoke(models, ["show", name], catch_exceptions=False).stdout
    preset = load_preset(name)
    assert all(note in shown for note in preset.notes)
    for step in ("convert", "preprocess", "train", "infer", "eval"):
        assert f"\n# {step}\n" in shown
    as_json = json.loads(CliRunner().invoke(models, ["show", name, "--json"], catch_exceptions=False).stdout)
    assert as_json["commands"].keys() == commands(preset).keys() and as_json["row"] == preset.row


def test_an_unknown_name_cannot_be_shown() -> None:
    result = CliRunner().invoke(models, ["show", "qwen2.5-7b"])
    assert isinstance(result.exception, ModelLinkError) and "qwen2.5-7b-32k" in (result.exception.fix or "")


@pytest.mark.parametrize("step", ["convert", "preprocess", "train", "infer", "eval"])
def test_shown_commands_have_real_options(step: str) -> None:
    for preset in map(load_preset, preset_names()):
        words = commands(preset)[step]
        if isinstance(words, str):
            assert preset.family is None
            continue
        check(without_launcher(words))


def without_launcher(words: list[str]) -> list[str]:
    """A command line as if it were typed without torchrun."""
    if words[0] != "torchrun":
        return words
    module = words.index("-m")
    assert words[module + 1] == "modellink.core.cli"
    return ["modellink-train", *words[module + 2:]]


def check(words: list[str]) -> None:
    """Hold a command line against the click command it names: subcommand, options, and that nothing required is missing."""
    module, function = COMMANDS[words[0]]
    if importlib.util.find_spec(module.rpartition(".")[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    command = getattr(importlib.import_module(module), function)
    rest = words[1:]
    if isinstance(command, click.Group):
        command, rest = command.get_command(click.Context(command), rest[0]), rest[1:]
    known = {option for param in command.params if isinstance(param, click.Option)
             for option in (*param.opts, *param.secondary_opts)}
    missing = {word for word in rest if word.startswith("--")} - known
    assert not missing, f"{' '.join(words)}: no {missing}"
    command.make_context(words[0], rest)  # raises where the line cannot be parsed
