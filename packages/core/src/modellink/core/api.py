# SPDX-License-Identifier: Apache-2.0
"""The public entry points for training from Python: `fit` settles the options and trains, `train` runs a prepared run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modellink.core import launch
from modellink.core.prepare.prepare import prepare
from modellink.core.run import Run
from modellink.core.train.announce import announce
from modellink.core.train.callbacks import Callback
from modellink.core.train.method import Method, find_method
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer

if TYPE_CHECKING:
    from modellink.core.train.history import Step


def fit(method: str | type[Method], settings: Mapping[str, Any], callbacks: Sequence[Callback] = ()) -> list[Step]:
    """Train a model.

    One process trains alone. For more, start the script under torchrun; every rank calls this function.

    Args:
        method: a subclass of `Method`, or the name of a registered one such as "pretrain" or "sft".
        settings: option values by field name, e.g. {"load": "./model", "lr": 1e-5}; `modellink-train METHOD --help` lists
            them with underscores as dashes.

    Returns:
        On the last rank the finished iterations, including those before a resume; an empty list on other ranks.

    Raises:
        ModelLinkError: a mistake in the settings, the data or the checkpoint.
    """
    launched = launch.under_launcher()
    run = prepare(method, [Layer("settings", dict(settings))], launch.world_size() if launched else None,
                  int(os.environ.get("LOCAL_RANK", "0")))
    if not launched and run.layout.world_size > 1:
        raise ModelLinkError(f"{run.layout} needs {run.layout.world_size} processes, and this is one", where="fit",
                             fix=f"start the script with torchrun --nproc-per-node {run.layout.world_size}")
    if run.resilience.enable_high_availability and launch.START not in os.environ:
        raise ModelLinkError("only the command restarts the ranks of a run", where="enable_high_availability",
                             fix="start the run with modellink-train, or remove the option")
    if run.determinism.use_deter_comp:
        from modellink.core.determinism import set_variables  # imports torch
        set_variables(run.device.kind)
    announce(run)
    join(run)
    own = method if isinstance(method, type) and method.name == run.method else None
    return train(run, own, callbacks)


def join(run: Run) -> None:
    """Join this process into the process groups of a run; every rank calls it once."""
    from modellink.core import processes  # imports torch
    processes.join(run.device, run.layout, run.optimizer.seed, timeout_minutes=run.parallel.distributed_timeout_minutes,
                   instances=run.optimizer_instances)


def train(run: Run, method: type[Method] | None = None, callbacks: Sequence[Callback] = ()) -> list[Step]:
    """Train a prepared run; every rank calls it after `join`.

    Args:
        method: the class of the training method. Default: the one registered as `run.method`.

    Returns:
        As `fit`.
    """
    from modellink.core.resilience.guard import guard
    from modellink.core.train.loop import train as loop  # imports megatron, which is on its device since `join`
    from modellink.core.train.ownership import own
    with own(run.checkpoint.save):
        return loop(run, (method or find_method(run.method))(run), callbacks, guard)
