# SPDX-License-Identifier: Apache-2.0
"""What a run says before it starts: a summary in three lines, and all settings in `SAVE/arguments.txt`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from modellink.ckpt_convert.weights import parameters
from modellink.core.launch import rank
from modellink.core.run import Run
from modellink.core.train.progress import read_progress
from modellink.kernels.files import atomic_write

FILE = "arguments.txt"
HEAD = "------------------------ ModelLink Arguments ------------------------"
FOOT = "-------------------- end of ModelLink Arguments ---------------------"
CHANGES = "changed when the run was resumed:"
SETTING = re.compile(r"^  (\w+) \.+ (.*)$", re.MULTILINE)


def announce(run: Run) -> None:
    """Print the summary on rank 0, and all settings if the run asks for it; all ranks may call it."""
    if rank() == 0:
        print(summary(run), flush=True)
        if run.logging.print_arguments:
            print(HEAD, *_lines(_texts(run)), FOOT, sep="\n", flush=True)


def summary(run: Run) -> str:
    """Return three lines: the model and where it runs; the data; the iterations and where they are saved."""
    return "\n".join((_model(run), _data(run), _iterations(run)))


def _model(run: Run) -> str:
    count = parameters(run.spec)
    size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    start = "random weights"
    if run.resumed is not None:
        start = f"resumed from {run.resumed}"
    elif run.source is not None:
        start = f"weights of {run.source.folder}"
    family = (run.source.family if run.source else run.checkpoint.model_type_hf) or "a model"
    ranks = run.layout.world_size
    where = f"{ranks} ranks on {run.device.kind} ({run.layout})" if ranks > 1 else run.device.kind
    return f"{run.method}: {family}, {size} parameters in {run.optimizer.dtype_name}, {start}, {where}"


def _data(run: Run) -> str:
    prefixes = [item for item in run.data.data_path if not _is_number(item)]
    source = ", ".join(prefixes[:1])
    if len(prefixes) > 1:
        source = f"{len(prefixes)} sets, the first is {source}"
    elif not prefixes:  # the method brings its own
        source = f"of {run.method}"
    samples, length = run.data.samples_per_iteration(run.layout.dp), run.data.seq_length
    up_to = "up to " if run.instruction.variable_seq_lengths else ""
    return f"data: {source}, {samples} samples of {up_to}{length:,} tokens per iteration"


def _iterations(run: Run) -> str:
    progress = None if run.resumed is None else read_progress(run.resumed)
    first = 1 if progress is None else progress.iteration + 1
    text = f"iterations {first} to {run.optimizer.train_iters}"
    if run.logging.skip_train:
        text = "evaluation without training"
    save, every = run.checkpoint.save, run.checkpoint.save_interval
    if save is None:
        return f"{text}, not saved (no --save)"
    interval = "" if every is None else f" every {every} iterations and"
    return f"{text}, saved in {save}{interval} at the end; all settings in {save / FILE}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(run: Run) -> dict[str, str]:
    values = run.settings
    return {name: str(values[name]) for name in sorted(values, key=str.lower)}


def _lines(texts: Mapping[str, str]) -> list[str]:
    return [f"  {name} {'.' * max(1, 48 - len(name))} {value}" for name, value in texts.items()]


def write_arguments(folder: Path, run: Run, iteration: int) -> None:
    """Write all settings of a run that starts or resumes at `iteration`.

    What a resumed run changes is listed below them, after the changes of earlier starts.
    """
    path, now, changes = folder / FILE, _texts(run), list[str]()
    if iteration and path.is_file():
        text = path.read_text("utf-8")
        settings, _, listed = text.partition(CHANGES)
        before = dict(SETTING.findall(settings))
        changes = [line for line in listed.splitlines() if line.strip()]
        changes += [f"  iteration {iteration}: {name} {before.get(name)} -> {now.get(name)}"
                    for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    with atomic_write(path, "w") as file:
        file.write("\n".join((HEAD, *_lines(now), FOOT, *((CHANGES, *changes) if changes else ()), "")))
