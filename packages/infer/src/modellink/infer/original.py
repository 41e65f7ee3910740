"""Command lines of the original's inference.py: its own flags (original_flags.yaml), and those of training, which its scripts
repeat for the model they load: the checkpoint says here what the model is."""

from __future__ import annotations

from typing import Any

import click

from modellink.kernels.options import fields_of
from modellink.kernels.original import original_flags, translate

MODEL, TRAINING = "the checkpoint says what the model is", "it is about training"


def in_our_words(args: list[str], command: click.Command) -> list[str]:
    """The arguments of one of our commands, those of the original translated."""
    own = {"--help"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    if all(arg.partition("=")[0] in own for arg in args if arg.startswith("--")):
        return args
    table = training() | original_flags("modellink.infer")  # imports torch, which help and our own flags do not wait for
    return translate(args, {flag: about for flag, about in table.items() if flag not in own})


def training() -> dict[str, dict[str, Any]]:
    """Every flag of training that means nothing to a model that is there."""
    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core.cli import training_command

    options = [option for option in training_command("pretrain").params if isinstance(option, click.Option)]
    names = {field.name for field in fields_of(ModelSpec)}
    of_model = {name for option in options if option.name in names for name in (*option.opts, *option.secondary_opts)}
    table: dict[str, dict[str, Any]] = {}
    for option in options:
        for name in (*option.opts, *option.secondary_opts):
            many = option.multiple or option.nargs != 1
            table[name] = {"values": 0 if option.is_flag else 1000 if many else 1,
                           "ignored": MODEL if name in of_model else TRAINING}
    for name, about in original_flags("modellink.core").items():
        words = " ".join([about.get("as", ""), *about.get("choices", {}).values()]).split()
        why = about.get("ignored") or (MODEL if of_model & set(words) else TRAINING)
        table[name] = {"values": about.get("values", 0), "ignored": why}
    return table
