# SPDX-License-Identifier: Apache-2.0
"""`modellink-train models`: a table of the presets, or one preset with the commands that use it.

Not here: the presets (presets/) and their use in a run (`--model` of the training commands).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import click

from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import parameters
from modellink.core.presets import SECTIONS, Preset, load_preset, preset_names
from modellink.kernels.command import command, group
from modellink.kernels.tables import print_table

COLUMNS = ("name", "size", "seq", "TP", "PP", "VPP", "CP", "EP", "layers", "MBS/GBS", "cluster", "tok/s")
NUMBERS = COLUMNS[1:]
OPTIONAL = ("cluster", "layers", "CP", "EP", "VPP")
DEVICES = 8
"""Devices per machine in the original's clusters; larger runs are started on each machine."""


@group(example="modellink-train models list", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every option.")
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the presets, or show one."""
    if context.invoked_subcommand is None:
        _list(as_json=as_json)


@command(name="list", example="modellink-train models list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every option.")
def list_models(as_json: bool) -> None:
    """List the presets: model, layout and batch size, and the original's speed in tokens per second and device."""
    _list(as_json=as_json)


def _list(*, as_json: bool) -> None:
    presets = [load_preset(name) for name in preset_names()]
    if as_json:
        print(json.dumps([facts(preset) for preset in presets], indent=2))
        return
    print_table(COLUMNS, [row(preset) for preset in presets], right=NUMBERS, optional=OPTIONAL, wrap="layers")


@command(name="show", example="modellink-train models show yi-34b-4k", starts=True)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show the preset NAME, with its notes and the commands that use it."""
    preset = load_preset(name)
    if as_json:
        print(json.dumps(facts(preset) | {"commands": dict(commands(preset))}, indent=2))
        return
    print(f"{preset.name}: row {preset.row}, {billions(preset.spec)} parameters, {preset.layout}\n")
    for section in SECTIONS:
        print(section)
        for option, value in getattr(preset, section).items():
            print(f"  {option:<37} {_text(value)}")
    print("original")
    for what, value in preset.original.items():
        print(f"  {what:<37} {' '.join(value) if isinstance(value, list) else _text(value)}")
    print(f"\npublic configuration: {preset.public or f'none: {preset.public_missing}'}")
    for note in preset.notes:
        print(f"note: {note}")
    for step, words in commands(preset).items():
        print(f"\n# {step}\n{words if isinstance(words, str) else command_line(words)}")


models.add_command(list_models)
models.add_command(show)


def billions(spec: ModelSpec) -> str:
    return f"{parameters(spec) / 1e9:.2f}B"


def row(preset: Preset) -> tuple[str, ...]:
    """The cells of one row of the table."""
    layout, data, speed = preset.layout, preset.data, preset.original["tokens_per_second"]
    return (preset.name, billions(preset.spec), str(data["seq_length"]),
            *(str(size) for size in (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep)),
            _text(list(layout.num_layer_list or ())), f"{data['micro_batch_size']}/{data['global_batch_size']}",
            preset.original["cluster"], "" if speed is None else str(speed))


def facts(preset: Preset) -> dict[str, Any]:
    """A preset with its derived values, for JSON."""
    return dataclasses.asdict(preset) | {"parameters": parameters(preset.spec), "layout": dataclasses.asdict(preset.layout)}


def commands(preset: Preset) -> dict[str, list[str] | str]:
    """Step -> the words of its command, or the reason why it has no command. Folders, prompt and learning rate are examples.

    A published model is converted and trained from its weights. Others start from random weights and a tokenizer, and are
    converted to Hugging Face format afterwards if the family has one.
    """
    hf, made, run = f"./{preset.public}-hf" if preset.public else "./tokenizer", f"./{preset.name}-mcore", f"./{preset.name}"
    text = ["modellink-preprocess", "--input", "./text.jsonl", "--output-prefix", "./data/text", "--tokenizer-name-or-path", hf,
            "--append-eod"]
    train = [*_trainer(preset), "--model", preset.name, "--data-path", "./data/text_text_document", "--train-iters", "2000",
             "--lr", "1e-6", "--lr-decay-style", "cosine"]
    tp = ["--tensor-model-parallel-size", str(preset.layout.tp)]
    ask = ["modellink-infer", "generate", "--load", run, *tp, "--prompt", "The capital of France is"]
    score = ["modellink-eval", "run", "--task", "mmlu", "--task-data-path", "./mmlu", "--load", run, *tp,
             "--output", f"{run}-mmlu"]
    if preset.public:
        return {"convert": ["modellink-convert", hf, made, "--to", "megatron-core", *_cut(preset)], "preprocess": text,
                "train": [*train, "--load", made, "--save", run], "infer": ask, "eval": score}
    back: list[str] | str = ["modellink-convert", run, f"{run}-hf", "--to", "hf"]
    if preset.family is None:
        back = "none: the model has no Hugging Face format"
    return {"preprocess": text, "train": [*train, "--tokenizer-name-or-path", hf, "--save", run], "convert": back,
            "infer": ask, "eval": score}


def _trainer(preset: Preset) -> list[str]:
    """The words that start the ranks: the command itself on one machine, torchrun on several."""
    size = preset.layout.world_size
    if size <= DEVICES:
        return ["modellink-train", "pretrain", "--nproc-per-node", str(size)]
    return ["torchrun", "--nnodes", str(size // DEVICES), "--nproc-per-node", str(DEVICES), "--node-rank", "0", "--master-addr",
            "HOST", "--master-port", "6000", "-m", "modellink.core.cli", "pretrain"]


def _cut(preset: Preset) -> list[str]:
    """Options of modellink-convert for the layout of a preset."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "num_layer_list",
             "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by")
    given = {name: preset.parallel[name] for name in names if preset.parallel.get(name, 1) != 1}
    return [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), _text(value))]


def command_line(words: list[str]) -> str:
    """A shell command, with line breaks before options."""
    lines = [""]
    for position, word in enumerate(words):
        piece = shlex.quote(word)
        option_and_value = len(piece) + 1 + (len(shlex.quote(words[position + 1])) if position + 1 < len(words) else 0)
        if word.startswith("--") and len(lines[-1]) + option_and_value > 110:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + piece
    return " \\\n".join(lines)


def _text(value: Any) -> str:
    """A value as written on a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
