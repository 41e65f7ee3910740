# SPDX-License-Identifier: Apache-2.0
"""A redrawn line, and lines that other processes print on the same terminal."""

from __future__ import annotations

import os
import subprocess
import sys

from screens import Recording, record, screen

REPORTS = """
import sys, time
from modellink.kernels.terminal import Line
line = Line(sys.stdout)
for number in range(60):
    line.show(f"iteration {number + 1} of 60" + "!" * 100, now=True)
    time.sleep(0.002)
line.leave()
"""
PRINTS = """
import sys, time
from modellink.kernels.messages import note
from modellink.kernels.terminal import above_a_line
with above_a_line():
    for number in range(30):
        print("saved", number)
        note(f"number {number}")
        time.sleep(0.003)
    raise SystemExit("the end")
"""
PARTS = """
from modellink.kernels.terminal import above_a_line
with above_a_line():
    print("one", end="", flush=True)
    print(" line")
    print("no newline", end="", flush=True)
print("!")
"""


def test_lines_of_another_process_go_above_the_redrawn_line():
    recording = Recording()
    environment = os.environ | {"TERM": "xterm"}
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=recording.theirs, stderr=recording.theirs, env=environment)
                 for code in (REPORTS, PRINTS)]
    assert [process.wait() for process in processes] == [0, 1]
    lines = screen(recording.close())
    printed = [f"{word} {number}" for number in range(30) for word in ("saved", "note: number")]
    assert [line for line in lines if not line.startswith("iteration")] == [*printed, "the end"]
    redrawn = [line for line in lines if line.startswith("iteration")]
    assert redrawn == [("iteration 60 of 60" + "!" * 100)[:79]]  # once, cut to the width


def test_what_is_not_a_terminal_is_left_alone():
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True)
    assert done.stdout.startswith("saved 0\nsaved 1\n") and "\x1b" not in done.stdout
    assert done.stderr.startswith("note: number 0\n") and "\x1b" not in done.stderr


def test_a_line_may_be_printed_in_parts():
    status, written = record([sys.executable, "-c", PARTS])
    assert status == 0 and screen(written) == ["one line", "no newline!"]
