"""`modellink-train`: a thin reading of options over `prepare` and the training methods.

Under torchrun each process runs its part; otherwise this process checks the run and starts --nproc-per-node ranks of itself.
Nothing here imports torch before the options are known to be good.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from functools import partial
from importlib import import_module, resources
from pathlib import Path

import click
import yaml

from modellink.ckpt_convert.iterations import last_complete
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core import launch
from modellink.core.announce import announce
from modellink.core.presets import load_preset
from modellink.core.run import CONFIGS, Run
from modellink.core.train.method import Method, find_method, registered
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.options import Layer, command, yaml_layer
from modellink.kernels.original import original_flags, translate

RESTART = Layer("the restart after a failure", {"auto_resume": True})
TOOLS = {"models": "models:models", "digests": "digests:digests", "determinism": "repeatability:determinism"}
"""Subcommands that train nothing -> module and command."""


class Commands(click.Group):
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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train large language models on Ascend NPUs, CUDA GPUs and CPUs."""


def training_command(name: str) -> click.Command:
    """The command of a training method: the options of every run, and its own."""
    method = find_method(name)
    own = [] if method.options is None else [method.options]

    @command(ModelSpec, *CONFIGS.values(), *own, name=name)
    @click.option("--model", metavar="PRESET",
                  help="Architecture, layout and batch size of a preset; see `modellink-train models`.")
    @click.option("--config", type=click.Path(path_type=Path), help="YAML file of options; the command line overrides it.")
    def run(model: str | None, config: Path | None, given: Layer) -> None:
        _start(method, model, config, given)
    run.help = method.summary
    return run


def _start(method: type[Method], model: str | None, config: Path | None, given: Layer) -> None:
    from modellink.core.prepare.prepare import prepare
    layers = ([load_preset(model).layer()] if model else []) + ([yaml_layer(config)] if config else []) + [given]
    launched = launch.under_launcher()
    if int(os.environ.get(launch.START, "1")) > 1:
        layers.append(RESTART)
    run = prepare(method, layers, launch.world_size() if launched else None, int(os.environ.get("LOCAL_RANK", "0")))
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
