# SPDX-License-Identifier: Apache-2.0
"""Command lines of the original's inference.py: its own flags (original_flags.yaml), and the flags of
training that its scripts repeat to describe the model, which the checkpoint describes here."""

from __future__ import annotations

from typing import Any

import click

from modellink.kernels.options import fields_of
from modellink.kernels.original import original_flags, translate

MODEL, TRAINING = "the checkpoint describes the model", "it concerns training"


def translate_original(args: list[str], command: click.Command) -> list[str]:
    """Return the arguments of one of our commands with the original's flags translated."""
    own = {"--help"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    if all(arg.partition("=")[0] in own for arg in args if arg.startswith("--")):
        return args
    table = training_flags() | original_flags("modellink.infer")
    return translate(args, {flag: about for flag, about in table.items() if flag not in own})


def training_flags() -> dict[str, dict[str, Any]]:
    """Return the translation of every flag of training that has no meaning for an existing model: it is
    ignored."""
    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core.cli import training_command

    options = [option for option in training_command("pretrain").params if isinstance(option, click.Option)]
    names = {field.name for field in fields_of(ModelSpec)}
    of_model = {name for option in options if option.name in names
                for name in (*option.opts, *option.secondary_opts)}
    table: dict[str, dict[str, Any]] = {}
    for option in options:
        for name in (*option.opts, *option.secondary_opts):
            table[name] = {"values": _value_count(option), "ignored": MODEL if name in of_model else TRAINING}
    for name, about in original_flags("modellink.core").items():
        words = " ".join([about.get("as", ""), *about.get("choices", {}).values()]).split()
        reason = MODEL if of_model & set(words) else TRAINING
        table[name] = {"values": about.get("values", 0), "ignored": about.get("ignored") or reason}
    return table


def _value_count(option: click.Option) -> int:
    """Return how many words may follow an option."""
    if option.is_flag:
        return 0
    return 1000 if option.multiple or option.nargs != 1 else 1
