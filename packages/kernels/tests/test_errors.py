# SPDX-License-Identifier: Apache-2.0
"""What a command prints and its exit status after an error."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from modellink.kernels.errors import InternalError, ModelLinkError, near


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import errno\nfrom modellink.kernels.errors import *\ndef body():\n    {body}\nrun_command(body)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


def test_a_users_mistake_ends_with_2_and_no_trace():
    done = run("raise ModelLinkError('3 rows', where='a.csv', fix='remove one')")
    assert done.returncode == 2
    assert done.stderr == "error: 3 rows\n  where: a.csv\n  fix:   remove one\n"


def test_the_trace_of_a_mistake_is_there_for_those_who_ask():
    assert "Traceback" in run("raise ModelLinkError('x')", MODELLINK_TRACE="1").stderr


@pytest.mark.parametrize("raised", ["InternalError('lost')", "ValueError('lost')"])
def test_a_fault_of_ours_ends_with_1_and_a_trace(raised):
    done = run(f"raise {raised}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "lost" in done.stderr


@pytest.mark.parametrize(("body", "said"), [
    ("with open('/dev/full', 'w') as file: file.write('x')",
     "error: No space left on device\n  fix:   free some space, or choose another disk\n"),
    ("raise PermissionError(errno.EACCES, 'Permission denied', 'a.bin')",
     "error: Permission denied\n  where: a.bin\n  fix:   choose another path, or ask for permission\n")])
def test_what_the_system_refuses_is_no_fault_of_ours(body, said):
    done = run(body)
    assert (done.returncode, done.stderr) == (2, said)


def test_an_interrupt_ends_with_130():
    assert run("raise KeyboardInterrupt").returncode == 130


def test_a_reader_that_goes_away_is_no_error():
    code = "from modellink.kernels.errors import run_command\nrun_command(lambda: [print('x' * 1000) for _ in range(1000)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(InternalError("what", where="there", fix="so")))
    assert type(error) is InternalError and str(error) == "what\n  where: there\n  fix:   so"


def test_an_error_knows_its_option():
    assert ModelLinkError("x", option="max_new_tokens").option == "max_new_tokens"
    assert ModelLinkError("x", where="--max-new-tokens").option == "max_new_tokens"
    assert ModelLinkError("x", where="--tp, --pp").option is None
    assert ModelLinkError("x", where="a.json").option is None
    assert pickle.loads(pickle.dumps(ModelLinkError("x", option="seed"))).option == "seed"


USAGE = """
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
import click
from modellink.kernels.errors import run_command
from modellink.kernels.command import command
from modellink.kernels.options import option, resolve, yaml_layer
@dataclass(frozen=True)
class Options:
    format: Literal["hf", "megatron-core", "torch-dist"] = option("hf", "Format.")
    train_iters: int = option(1, "Iterations.", minimum=1)
@click.group()
def group(): ...
@command(Options, name="run")
@click.argument("src")
@click.option("--config")
def run(src, config, given):
    layers = [yaml_layer(Path(config))] if config else []
    print(resolve([Options], *layers, given)[Options])
group.add_command(run)
run_command(lambda: group.main(sys.argv[1:], "prog", standalone_mode=False))
"""


@pytest.mark.parametrize(("arguments", "what", "fix"), [
    (["run", "a", "--format", "mcore"], "--format is 'mcore', it must be one of hf, megatron-core, torch-dist",
     "did you mean megatron-core?"),
    (["run", "a", "--format", "torch-dits"], "--format is 'torch-dits'", "did you mean torch-dist?"),
    (["run", "a", "--train-iters", "ten"], "--train-iters is 'ten', it must be a whole number", None),
    (["run", "a", "--train-itres", "3"], "unknown option --train-itres", "did you mean --train-iters?"),
    (["run", "a", "--zzz"], "unknown option --zzz", "see prog run --help"),
    (["run", "a", "--format"], "--format needs a value", "see --help"),
    (["run"], "SRC is required", "prog run [OPTIONS] SRC"),
    (["run", "a", "b"], "unexpected argument b", "see prog run --help"),
    (["rnu", "a"], "unknown command rnu", "did you mean run?"),
])
def test_click_errors_have_our_format(arguments, what, fix):
    done = subprocess.run([sys.executable, "-c", USAGE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {what}"), done.stderr
    assert "  where: command line\n" in done.stderr
    if fix:
        assert f"  fix:   {fix}\n" in done.stderr


def test_a_value_of_a_yaml_file_has_the_same_error(tmp_path):
    (tmp_path / "run.yaml").write_text("format: core\n")
    command = [sys.executable, "-c", USAGE, "run", "a", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean megatron-core?" in done.stderr and "run.yaml" in done.stderr


def test_near_names_what_was_meant():
    assert near("train_itres", ["lr", "train_iters", "save"]) == "did you mean train_iters?"
    assert near("zzz", ["lr"]) == ""
    assert isinstance(InternalError("x"), ModelLinkError)
