# SPDX-License-Identifier: Apache-2.0
"""Notes on stderr, printed once however many ranks a run has, and how ranks that share a terminal avoid repeating each other.

A launcher of ours (core's launch.py, resilience/agent.py) adds `for_ranks()` to the environment of its ranks. Under torchrun
these variables are missing, and all ranks write to one terminal.

Not here: the format of errors (errors.py) and progress (progress.py).
"""

from __future__ import annotations

import json
import os
import sys
import time
from multiprocessing import parent_process

SHOWN = "MODELLINK_NOTES_SHOWN"
"""Environment variable: JSON list of the notes that the launcher has printed, which its ranks do not repeat."""
KEPT = "MODELLINK_STDERR_KEPT"
"""Environment variable, set if the launcher keeps the stderr of all local ranks but the first, to show it after a failure."""
PATIENCE = 2.0  # seconds in which torchrun stops a rank that would only repeat the error of another one

_shown: list[str] = []


def rank() -> int:
    """Return the number of this process among the ranks of a run; 0 if it runs alone."""
    return int(os.environ.get("RANK", "0"))


def note(text: str, *, every_rank: bool = False) -> None:
    """Print `note: text` on rank 0, unless the launcher of the ranks has printed it; all ranks may call it.

    Worker processes of multiprocessing print nothing: they check what their parent has checked.

    Args:
        every_rank: print it on any rank, because only this one knows it.
    """
    quiet = rank() > 0 or parent_process() is not None
    if (quiet and not every_rank) or text in _inherited():
        return
    _shown.append(text)
    # survivors of a failure are renumbered, but the launcher keeps the stderr of the same processes
    kept = KEPT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
    print(f"note: {text}", file=sys.stdout if kept else sys.stderr, flush=True)


def for_ranks() -> dict[str, str]:
    """Return the variables that a launcher adds to the environment of its ranks."""
    return {SHOWN: json.dumps([*_inherited(), *_shown]), KEPT: "1"}


def is_under_our_launcher() -> bool:
    """Return whether the launcher shows this rank's error output if nobody else explains the failure."""
    return KEPT in os.environ


def let_first_rank_report() -> None:
    """Wait before printing an error that other ranks of the same terminal may have too.

    Rank 0 does not wait. When it ends with the same error, torchrun stops this rank during the wait, so that the error is
    printed once. When only this rank has the error, it is printed a little later. The first rank of another machine waits
    less than the ranks next to it, so that each machine reports once.
    """
    if rank() > 0 and not is_under_our_launcher():
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        time.sleep(PATIENCE if is_first_here else 2 * PATIENCE)


def _inherited() -> list[str]:
    notes: list[str] = json.loads(os.environ.get(SHOWN, "[]"))
    return notes
