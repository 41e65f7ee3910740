# SPDX-License-Identifier: Apache-2.0
"""The ranks of a command: which one this process is, and how the others are started.

With `--tp N` a command starts N ranks of itself and waits for them; under torchrun, on one machine or
several, each process is a rank already. The first rank reads prompts and prints.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modellink.core import launch
from modellink.infer.options import ModelOptions

if TYPE_CHECKING:
    from modellink.infer.engine import Engine
    from modellink.infer.plan import LoadPlan

MODULE = "modellink.infer.cli"


def is_first_rank() -> bool:
    """Whether this is the first rank, or the process that starts the ranks."""
    return launch.rank() == 0


def must_start_ranks(model: ModelOptions) -> bool:
    """Whether the model needs several ranks that are not running yet."""
    return model.layout().world_size > 1 and not launch.under_launcher()


def start_ranks(model: ModelOptions, more: Sequence[str] = (), *,
                forward: tuple[signal.Signals, ...] = ()) -> None:
    """Run this command on every rank, with additional arguments, and exit with their status."""
    sys.exit(launch.spawn(model.layout().world_size, MODULE, [*sys.argv[1:], *more], forward=forward))


@contextmanager
def prompts_as_file(prompts: Sequence[Any] | None) -> Iterator[list[str]]:
    """Yield arguments that pass prompts to the ranks, if they were read from stdin, which only one process
    can read."""
    if prompts is None:
        yield []
        return
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            file.write(json.dumps(text) + "\n")
        file.flush()
        yield ["--prompt-file", file.name]


def open_model(model: ModelOptions) -> LoadPlan:
    """Open and check the checkpoint; imports torch."""
    from modellink.infer.plan import make_load_plan
    return make_load_plan(model.load, layout=model.layout(), device=model.device,
                          index=int(os.environ.get("LOCAL_RANK", "0")), dtype=model.dtype,
                          family=model.model_type_hf, tokenizer=model.tokenizer_name_or_path,
                          prompt_type=model.template, iteration=model.ckpt_step)


def build_engine(model: ModelOptions, plan: LoadPlan, batch_size: int) -> Engine:
    """Load the model on this rank; imports megatron-core."""
    from modellink.infer.engine import Engine
    return Engine(plan, batch_size=batch_size, cache_tokens=model.cache_tokens, native=model.native,
                  int8=model.int8, graphs=model.graphs, show=True)
