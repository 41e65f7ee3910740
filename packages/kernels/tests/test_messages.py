# SPDX-License-Identifier: Apache-2.0
"""Notes and errors of a run with several ranks appear once."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest

from modellink.kernels import messages
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.messages import KEPT, for_ranks, note


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", KEPT, messages.SHOWN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(messages, "_shown", [])


def test_rank_0_prints_notes(monkeypatch, capsys):
    note("alone")
    monkeypatch.setenv("RANK", "0")
    note("of rank 0")
    monkeypatch.setenv("RANK", "1")
    note("of rank 1")
    note("known to rank 1", every_rank=True)
    assert capsys.readouterr() == ("", "note: alone\nnote: of rank 0\nnote: known to rank 1\n")


def test_ranks_do_not_repeat_what_their_launcher_has_printed(monkeypatch, capsys):
    note("before")
    for name, value in for_ranks().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    note("before")
    note("after")
    note("after")  # an event may occur twice
    monkeypatch.setenv("LOCAL_RANK", "1")  # its stderr is shown only if the run fails
    note("of a survivor that is rank 0 now")
    monkeypatch.setenv("RANK", "1")
    note("known to rank 1", every_rank=True)
    assert capsys.readouterr() == ("note: of a survivor that is rank 0 now\nnote: known to rank 1\n",
                                   "note: before\nnote: after\nnote: after\n")


def test_worker_processes_are_quiet(capfd):
    process = multiprocessing.get_context("spawn").Process(target=note, args=("of a worker",))
    process.start()
    process.join()
    assert process.exitcode == 0 and capfd.readouterr().err == ""


@pytest.mark.parametrize(("environment", "seconds"), [
    ({}, 0), ({"RANK": "0", "LOCAL_RANK": "0"}, 0), ({"RANK": "1", "LOCAL_RANK": "1"}, 2 * messages.PATIENCE),
    ({"RANK": "8", "LOCAL_RANK": "0"}, messages.PATIENCE), ({"RANK": "1", "LOCAL_RANK": "1", KEPT: "1"}, 0)])
def test_a_rank_lets_others_report_the_same_error_first(monkeypatch, capsys, environment, seconds):
    waits = [0.0]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(messages.time, "sleep", waits.append)

    def mistake() -> None:
        raise ModelLinkError("a mistake")

    def bug() -> None:
        raise KeyError("a bug")
    for command, status in ((mistake, 2), (bug, 1)):
        with pytest.raises(SystemExit) as ended:
            run_command(command)
        assert ended.value.code == status and "error: " in capsys.readouterr().err  # heard if nobody stops this rank
    assert sum(waits) == 2 * seconds


INTERRUPTED = """
from modellink.kernels.errors import run_command
def command():
    raise KeyboardInterrupt
run_command(command)
"""


def test_only_the_launcher_says_interrupted(monkeypatch):
    said = []
    for kept in (False, True):
        if kept:
            monkeypatch.setenv(KEPT, "1")
        done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
        assert done.returncode == 130
        said.append(done.stderr)
    assert said == ["interrupted\n", ""]
