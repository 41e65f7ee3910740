# SPDX-License-Identifier: Apache-2.0
"""`modellink-train`: a thin reading of options over `prepare` and the training methods.

Under torchrun each process runs its part; otherwise this process checks the run and starts --nproc-per-node ranks of itself.
Nothing here imports torch before the options are known to be good.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import ClassVar

import click
import yaml

from modellink.ckpt_convert.iterations import last_complete
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core import launch
from modellink.core.presets import load_preset
from modellink.core.run import CONFIGS, Run
from modellink.core.train.announce import announce
from modellink.core.train.method import Method, find_method, registered
from modellink.kernels.command import Group, command, group
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.general_options import GENERAL, ConfigFileOptions, DryRun, print_plan, with_file
from modellink.kernels.options import Layer, option
from modellink.kernels.original import original_flags, translate

RESTART = Layer("the restart after a failure", {"auto_resume": True})
TOOLS = {"models": "models:models", "digests": "digests:digests", "determinism": "repeatability:determinism"}
"""Subcommands that train nothing -> module and command."""
EXAMPLE = """modellink-train {method} --load ./checkpoint --save ./run \\
    --data-path ./data/{data} --seq-length 4096 \\
    --train-iters 1000 --lr 1e-5 --tp 2"""
DATA = {"pretrain": "text_text_document"}
"""Data of the example by method. Default: chats."""


@dataclass(frozen=True)
class PresetOptions:
    """The preset that a run starts from."""

    heading: ClassVar[str] = GENERAL

    model: str | None = option(None, "Architecture, layout and batch size of a preset; see `modellink-train models`.")


class Commands(Group):
    """The tools of this package and every registered training method; a command is imported when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*registered(), *TOOLS]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in TOOLS:
            module, attribute = TOOLS[name].split(":")
            tool: click.Command = getattr(import_module(f"modellink.core.{module}"), attribute)
            return tool
        if name not in registered():
            return None
        try:
            return training_command(name)
        except ModelLinkError as error:  # a broken package must not break the help of the others
            return _unavailable(name, error)


def _unavailable(name: str, error: ModelLinkError) -> click.Command:
    """A command that raises `error` when it is used."""
    def fail(words: tuple[str, ...]) -> None:
        raise error
    return click.Command(name, callback=fail, params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
                         help=f"Not available: {error.what}.", context_settings={"ignore_unknown_options": True})


@group(cls=Commands, example=EXAMPLE.format(method="pretrain", data=DATA["pretrain"]))
def train() -> None:
    """Train large language models on Ascend NPUs, CUDA GPUs and CPUs."""


def training_command(name: str) -> click.Command:
    """The command of a training method: the options of every run, and its own."""
    method = find_method(name)
    own = [] if method.options is None else [method.options]

    @command(*CONFIGS.values(), *own, PresetOptions, ConfigFileOptions, DryRun, ModelSpec, name=name, starts=True,
             help=method.summary, example=EXAMPLE.format(method=name, data=DATA.get(name, "chats")))
    def run(given: Layer, dry_run: DryRun | None) -> None:
        _start(method, given, dry_run)
    return run


def _start(method: type[Method], given: Layer, dry_run: DryRun | None) -> None:
    from modellink.core.prepare.prepare import prepare
    values = dict(given.values)
    model = values.pop("model", None)
    layers = [*([load_preset(model).layer()] if model else []), *with_file(Layer(given.source, values))]
    launched = launch.under_launcher()
    if int(os.environ.get(launch.START, "1")) > 1:
        layers.append(RESTART)
    devices = dry_run.devices if dry_run else None
    run = prepare(method, layers, launch.world_size() if launched else devices, int(os.environ.get("LOCAL_RANK", "0")))
    if dry_run:
        announce(run)
        print_plan([])
        return
    if run.resilience.enable_high_availability and launch.START not in os.environ:
        sys.exit(_start_agent(run, method, layers))
    if run.determinism.use_deter_comp:
        from modellink.core.determinism import set_variables
        set_variables(run.device.kind)
    if not launched and run.layout.world_size > 1:
        sys.exit(launch.spawn(run.layout.world_size, "modellink.core.cli", sys.argv[1:], forward=(signal.SIGTERM,)))
    _train(run)


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder; None without one."""
    with contextlib.suppress(ModelLinkError):
        return last_complete(folder)
    return None


def _start_agent(run: Run, method: type[Method], layers: list[Layer]) -> int:
    if launch.under_launcher():
        raise ModelLinkError("torchrun stops all ranks when one fails", where="--enable-high-availability",
                             fix="start modellink-train itself on every machine, with --nnodes and --rdzv-endpoint")
    from modellink.core.prepare.prepare import prepare
    from modellink.core.resilience.agent import run_agent

    def fewer(count: int) -> int | None:
        for smaller in range(count - 1, 0, -1) if run.resilience.nodes[1] == 1 else ():
            with contextlib.suppress(ModelLinkError):
                prepare(method, [*layers, RESTART], smaller)
                return smaller
        return None
    assert run.checkpoint.save is not None
    return run_agent(run, "modellink.core.cli", sys.argv[1:], fewer, partial(newest, run.checkpoint.save))


def _train(run: Run) -> None:
    from modellink.core import api, processes
    announce(run)
    api.join(run)
    with processes.cause_first():
        api.train(run)


def translate_original(words: list[str]) -> list[str]:
    """A command line that may be the original's in our options, with the original's defaults for what it leaves out."""
    defaults = yaml.safe_load(resources.files("modellink.core").joinpath("original_defaults.yaml").read_text("utf-8"))
    described = any(word.partition("=")[0] in ("--load", "--model", "--config", "--pretrained-checkpoint") for word in words)
    taken = defaults["run"] if described else f"{defaults['run']} {defaults['architecture']}"
    return translate(words, original_flags("modellink.core"), taken.split())


def main() -> None:
    run_command(_run)


def _run() -> None:
    if sys.argv[1:2] and sys.argv[1] in registered():
        sys.argv[2:] = translate_original(sys.argv[2:])  # also for the ranks that are started with it
    train(standalone_mode=False)


if __name__ == "__main__":
    main()
