"""A conversion that is killed leaves nothing that counts as a checkpoint, and the same command ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from modellink.ckpt_convert import open_checkpoint
from modellink.kernels.errors import ModelLinkError

Make = Callable[..., Path]
Run = Callable[..., CompletedProcess[str]]
Content = Callable[[Path], dict[str, bytes]]
TARGETS = {"megatron-core": ["--to", "megatron-core", "--tp", "3", "--pp", "2"],
           "hf": ["--to", "hf", "--max-shard-size", "0.00002"]}

SLOWLY = """
import importlib, time
from modellink.ckpt_convert.cli import main
convert = importlib.import_module("modellink.ckpt_convert.convert")
write, begin = convert.writing.write, convert._write_files
def slow(*args):
    time.sleep(0.03)
    return write(*args)
def say(*args):
    print("writing", flush=True)
    return begin(*args)
convert.writing.write, convert._write_files = slow, say
main()
"""
"""The command with a pause before each file, so that a kill finds it at work."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("point", ["after-write", "after-file-1", "after-file-4", "before-rename"])
def test_killed_and_run_again(target: str, point: str, make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    arguments = [*TARGETS[target], "--verify", "--no-verify-model"]
    killed = run([source, tmp_path / "out", *arguments], MODELLINK_KILL_AT=point)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    if point != "before-rename":  # there, all is written but the name
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


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.stress)])
def test_killed_at_random_moments(kills: int, make_model: Make, content: Content, tmp_path: Path) -> None:
    """The command in a process of its own, killed again and again while it writes, ends with the bytes of an unbroken run."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    moments = random.Random(seed)
    source = make_model("llama", num_hidden_layers=12, hidden_size=60)
    command = [sys.executable, "-c", SLOWLY, str(source), str(tmp_path / "out"), "--to", "megatron-core", "--tp=3", "--pp=4"]
    done = 0
    while done < kills:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.wait(timeout=60)
        if (tmp_path / "out").exists():  # it was faster
            assert open_checkpoint(tmp_path / "out").layout.tp == 3
            shutil.rmtree(tmp_path / "out")
        else:
            done += 1
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    straight = [*command[:4], str(tmp_path / "straight"), *command[5:]]
    assert subprocess.run(straight, capture_output=True, check=False).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_another_conversion_does_not_go_on_from_it(make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
    source = make_model("llama")
    run([source, tmp_path / "out", *TARGETS["megatron-core"]], MODELLINK_KILL_AT="after-file-2")
    again = run([source, tmp_path / "out", "--to", "megatron-core", "--pp", "4"])
    assert again.returncode == 0 and "belongs to another conversion" in again.stderr
    run([source, tmp_path / "straight", "--to", "megatron-core", "--pp", "4"])
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_a_changed_source_starts_anew(make_model: Make, run: Run, content: Content, tmp_path: Path) -> None:
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
