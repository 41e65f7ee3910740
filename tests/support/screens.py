# SPDX-License-Identifier: Apache-2.0
"""What a command shows on a terminal: it runs on a pseudo-terminal of 80 columns, and a small emulator applies what it writes.

The emulator knows what our commands use: newline, carriage return, erasing a line, moving up; it ignores colors.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Sequence

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[()][A-Z0-9]")


class Recording:
    """A pseudo-terminal that records what processes write to `theirs` until it is closed."""

    def __init__(self, columns: int = 80) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self.ours, 1 << 16):
                self._written += chunk
        except OSError:  # Linux ends a pseudo-terminal with EIO
            pass

    def close(self) -> str:
        """Close both ends, after all processes have closed theirs; return what was written."""
        os.close(self.theirs)
        self._reader.join()
        os.close(self.ours)
        return self._written.decode()


def record(command: Sequence[str], columns: int = 80, **environment: str) -> tuple[int, str]:
    """Run a command with stdout and stderr on a terminal; return its status and what it wrote."""
    recording = Recording(columns)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=recording.theirs, stderr=recording.theirs,
                          env=os.environ | {"TERM": "xterm"} | environment)
    return done.returncode, recording.close()


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after `written`, those that have scrolled away included."""
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(written):
        if found := SEQUENCE.match(written, position):
            position = found.end()
            if found[2] == "K" and found[1] == "2":
                lines[row] = ""
            elif found[2] == "A":
                row = max(0, row - int(found[1] or 1))
            continue
        character = written[position]
        position += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1:]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]
