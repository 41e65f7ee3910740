# SPDX-License-Identifier: Apache-2.0
"""A killed conversion leaves nothing that is taken for a checkpoint, and the same command ends with the same bytes."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.cli import main
from modellink.ckpt_convert.plan import ConversionPlan
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.owner import owned
from modellink.kernels.parallel import ParallelLayout

Make = Callable[..., Path]
Run = Callable[..., CompletedProcess[str]]
Content = Callable[[Path], dict[str, bytes]]
TARGETS = {"megatron-core": ["--to", "megatron-core", "--tp", "3", "--pp", "2"],
           "hf": ["--to", "hf", "--max-shard-size", "0.00002"]}

def start(arguments: Sequence[object]) -> tuple[int, int]:
    """Fork a process that runs the command with a pause before each file, so that a kill interrupts it.

    Returns (process id, descriptor of a pipe that has a line once it writes).
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        convert = importlib.import_module("modellink.ckpt_convert.convert")
        write, begin = convert.writing.write, convert._write_files

        def slow(*args: Any) -> Any:
            time.sleep(0.03)
            return write(*args)

        def say(*args: Any) -> Any:
            os.write(writing, b"writing\n")
            return begin(*args)

        vars(convert.writing)["write"], vars(convert)["_write_files"] = slow, say
        torch.set_num_threads(torch.get_num_threads())  # creates torch's pool again, before several threads do so at once
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.argv = ["modellink-convert", *map(str, arguments)]
        main()
    except SystemExit as done:
        os._exit(done.code if isinstance(done.code, int) else 1)
    finally:
        os._exit(99)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("point", ["after-write", "after-file-1", "after-file-4", "before-rename"])
def test_killed_and_run_again(target: str, point: str, make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    arguments = [*TARGETS[target], "--verify", "--no-verify-model"]
    killed = run([source, tmp_path / "out", *arguments], MODELLINK_KILL_AT=point)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    if point != "before-rename":  # there, only the rename is missing
        with pytest.raises(ModelLinkError):
            open_checkpoint(tmp_path / "out.tmp")
    again = run([source, tmp_path / "out", *arguments])
    assert again.returncode == 0, again.stderr
    assert ("resuming after" in again.stderr) == (point != "after-write")
    if point == "after-file-4":
        assert "resuming after 4 finished files" in again.stderr
    assert run([source, tmp_path / "straight", *arguments]).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "straight"]


def test_a_second_conversion_into_a_target_is_refused(make_model: Make, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    with owned(tmp_path / "out"):
        temporary = tmp_path / "out.tmp"
        temporary.mkdir()
        (temporary / "convert.journal").write_bytes(b"")
        with pytest.raises(ModelLinkError, match="is writing to this output"):
            convert(source, tmp_path / "out", to="megatron-core", overwrite=True)
        assert content(temporary) == {"convert.journal": b""}


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.stress)])
def test_killed_at_random_moments(kills: int, make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    """The command in its own process, killed repeatedly while it writes, ends with the bytes of an uninterrupted run."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    moments = random.Random(seed)
    source = make_model("llama", num_hidden_layers=12, hidden_size=60)
    options = [source, tmp_path / "out", "--to", "megatron-core", "--tp=3", "--pp=4"]
    done = 0
    while done < kills:
        child, reading = start(options)
        assert os.read(reading, 100) == b"writing\n"
        time.sleep(moments.uniform(0, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        if (tmp_path / "out").exists():  # it finished before the kill
            assert open_checkpoint(tmp_path / "out").layout.tp == 3
            shutil.rmtree(tmp_path / "out")
        else:
            done += 1
    assert run(options).returncode == 0
    assert run([source, tmp_path / "straight", *options[2:]]).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_another_conversion_does_not_go_on_from_it(make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    run([source, tmp_path / "out", *TARGETS["megatron-core"]], MODELLINK_KILL_AT="after-file-2")
    again = run([source, tmp_path / "out", "--to", "megatron-core", "--pp", "4"])
    assert again.returncode == 0 and "belongs to another conversion" in again.stderr
    run([source, tmp_path / "straight", "--to", "megatron-core", "--pp", "4"])
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_a_changed_source_starts_again(make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    run([source, tmp_path / "out", *TARGETS["megatron-core"]], MODELLINK_KILL_AT="after-file-2")
    shutil.copy(source / "model.safetensors", source / "copy")
    (source / "copy").rename(source / "model.safetensors")
    assert "starting from scratch" in run([source, tmp_path / "out", *TARGETS["megatron-core"]]).stderr


def test_overwriting_keeps_the_old_until_the_new_is_whole(make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    run([source, tmp_path / "out", "--to", "megatron-core"])
    before = content(tmp_path / "out")
    arguments = [source, tmp_path / "out", *TARGETS["megatron-core"], "--overwrite"]
    run(arguments, MODELLINK_KILL_AT="after-file-3")
    assert content(tmp_path / "out") == before
    assert run(arguments).returncode == 0
    assert open_checkpoint(tmp_path / "out").layout.tp == 3


def test_a_fingerprint_does_not_change_between_versions(make_model: Make, tmp_path: Path) -> None:
    """A conversion that version 0.1.0 started is resumed: formats, adapters and new fields are hashed as it did."""
    source = open_checkpoint(make_model("llama", num_hidden_layers=1))
    merged = replace(source, merged=AdapterConfig(4, 6.0))
    layout = ParallelLayout()
    plan = ConversionPlan(merged, "torch-dist", "torch-dist", layout, torch.float32, (), {"index.json": {"a": 1}})
    to, described, adapters, spec, stats, output, index = plan._identity()
    assert to == "torch_dist" and output == [] and index == {"a": 1}
    assert described == "ParallelLayout(tp=1, pp=1, vpp=1, cp=1, ep=1, dp=1, num_layer_list=None, ulysses=1)"
    assert adapters == ["None", "LoraConfig(r=4, alpha=6.0, dropout=0.0, rslora=False)"]
    assert "layer_windows" not in spec and spec["num_layers"] == 1 and spec["sliding_window"] is None
    assert next(path for path, _, _ in stats) == str((tmp_path / "hf/model.safetensors").resolve())
