"""`modellink-train`: a thin reading of options over `prepare` and the training functions.

Under torchrun each process runs its part; otherwise this process checks the run and starts --nproc-per-node ranks of itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from functools import partial
from importlib import resources
from pathlib import Path

import click
import yaml

from modellink.ckpt_convert.iterations import last_complete
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core import processes
from modellink.core.determinism import set_variables
from modellink.core.digests import digests
from modellink.core.models import models
from modellink.core.presets import load_preset
from modellink.core.repeatability import determinism
from modellink.core.run import CONFIGS, Run, prepare
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.options import Layer, command, yaml_layer
from modellink.kernels.original import original_flags, translate

AGAIN = Layer("the start after a failure", {"auto_resume": True})


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train large language models on Ascend NPUs, CUDA GPUs and CPUs."""


@command(ModelSpec, *CONFIGS, name="pretrain")
@click.option("--model", metavar="PRESET", help="Architecture, layout and batch of a preset; see `modellink-train models`.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of options; the command line wins over it.")
def pretrain(model: str | None, config: Path | None, given: Layer) -> None:
    """Pretrain on .bin/.idx data, from random weights, from a checkpoint, or on from where a run stopped."""
    _start(model, config, given)


@command(ModelSpec, *CONFIGS, name="sft")
@click.option("--model", metavar="PRESET", help="Architecture, layout and batch of a preset; see `modellink-train models`.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of options; the command line wins over it.")
def sft(model: str | None, config: Path | None, given: Layer) -> None:
    """Fine-tune on instruction data: the loss is the mean over what the assistant says."""
    _start(model, config, Layer(given.source, {**given.values, "is_instruction_dataset": True}))


def _start(model: str | None, config: Path | None, given: Layer) -> None:
    layers = ([load_preset(model).layer()] if model else []) + ([yaml_layer(config)] if config else []) + [given]
    launched = processes.under_launcher()
    if int(os.environ.get(processes.START, "1")) > 1:
        layers.append(AGAIN)
    run = prepare(layers, processes.world_size() if launched else None, int(os.environ.get("LOCAL_RANK", "0")))
    if run.resilience.enable_high_availability and processes.START not in os.environ:
        sys.exit(_start_agent(run, layers))
    if run.determinism.use_deter_comp:
        set_variables(run.device.kind)
    if not launched and run.layout.world_size > 1:
        sys.exit(processes.spawn(run.layout.world_size, "modellink.core.cli", sys.argv[1:], forward=(signal.SIGTERM,)))
    _train(run)


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint below a folder, if there is one."""
    with contextlib.suppress(ModelLinkError):
        return last_complete(folder)
    return None


def _start_agent(run: Run, layers: list[Layer]) -> int:
    if processes.under_launcher():
        raise ModelLinkError("torchrun ends all ranks when one fails", where="--enable-high-availability",
                             fix="start modellink-train itself on every machine, with --nnodes and --rdzv-endpoint")
    from modellink.core.resilience.agent import launch

    def fewer(count: int) -> int | None:
        for smaller in range(count - 1, 0, -1) if run.resilience.nodes[1] == 1 else ():
            with contextlib.suppress(ModelLinkError):
                prepare([*layers, AGAIN], smaller)
                return smaller
        return None
    assert run.checkpoint.save is not None
    return launch(run, "modellink.core.cli", sys.argv[1:], fewer, partial(newest, run.checkpoint.save))


def _train(run: Run) -> None:
    if processes.rank() == 0:
        print_arguments(run)
    processes.join(run.device, run.layout, run.optimizer.seed, timeout_minutes=run.parallel.distributed_timeout_minutes,
                   instances=run.optimizer_instances)
    from modellink.core.posttrain.sft import sft  # imports megatron, which only now is on its device
    from modellink.core.train.pretrain import pretrain
    with processes.cause_first():
        (sft if run.data.is_instruction_dataset else pretrain)(run)


def print_arguments(run: Run) -> None:
    """All settings, in the original's form."""
    values = run.settings
    print("------------------------ ModelLink Arguments ------------------------")
    for name in sorted(values, key=str.lower):
        print(f"  {name} {'.' * max(1, 48 - len(name))} {values[name]}")
    print("-------------------- end of ModelLink Arguments ---------------------", flush=True)


train.add_command(pretrain)
train.add_command(sft)
train.add_command(models)
train.add_command(digests)
train.add_command(determinism)


def in_our_words(words: list[str]) -> list[str]:
    """A command line that may be the original's, with what holds there where it says nothing."""
    defaults = yaml.safe_load(resources.files("modellink.core").joinpath("original_defaults.yaml").read_text("utf-8"))
    described = any(word.partition("=")[0] in ("--load", "--model", "--config", "--pretrained-checkpoint") for word in words)
    taken = defaults["run"] if described else f"{defaults['run']} {defaults['architecture']}"
    return translate(words, original_flags("modellink.core"), taken.split())


def main() -> None:
    run_command(_run)


def _run() -> None:
    if sys.argv[1:2] in (["pretrain"], ["sft"]):
        sys.argv[2:] = in_our_words(sys.argv[2:])  # also for the ranks that are started with it
    train(standalone_mode=False)


if __name__ == "__main__":
    main()
