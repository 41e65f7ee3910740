# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr: plain lines without a terminal, a bar on one."""

from __future__ import annotations

import subprocess
import sys

from screens import record, screen

from modellink.kernels import progress

CODE = """
from modellink.kernels.progress import Work
with Work("counting", 3, unit="sheep", show={show}) as work:
    for _ in range(3):
        work.advance()
"""


def test_a_pipe_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", CODE.format(show=True)], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.stderr.startswith("counting: 3 of 3 sheep, ")
    assert len(done.stderr.splitlines()) == 1


def test_bytes_are_gigabytes_and_a_line_on_the_way_says_how_long_it_takes(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 0.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Work("copying", 2_000_000_000, unit="bytes") as work:
        work.advance(500_000_000)
        work.done = work.total
    assert capsys.readouterr().err == ("copying: 0.50 of 2.00 GB, 0.03 GB/s, 0:01:00 left\n"
                                       "copying: 2.00 of 2.00 GB, 0.05 GB/s, 40.0 s\n")


def test_few_bytes_are_megabytes(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Work("copying", 2_500_000, unit="bytes") as work:
        work.advance(2_500_000)
    assert capsys.readouterr().err == "copying: 2.50 of 2.50 MB, 2.50 MB/s, 1.0 s\n"


def test_other_ranks_are_quiet():
    done = subprocess.run([sys.executable, "-c", CODE.format(show=False)], capture_output=True, text=True)
    assert done.stdout == done.stderr == ""


def test_a_terminal_gets_a_bar():
    status, written = record([sys.executable, "-c", CODE.format(show=True)])
    assert status == 0
    (line,) = screen(written)
    assert line.startswith("counting") and "━" in line and "3 of 3 sheep" in line
