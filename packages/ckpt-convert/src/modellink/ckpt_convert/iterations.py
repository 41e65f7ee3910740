# SPDX-License-Identifier: Apache-2.0
"""The iterations of a Megatron checkpoint folder, and which of them are complete.

An iteration of ours is complete if its marker lists files that are all present (kernels.files). Checkpoints
of Megatron and of the original have no marker; the tracker file decides. Unfinished iterations are skipped
with a note, and the last complete one is used.
"""

from __future__ import annotations

import re
from pathlib import Path

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import MARKER, incomplete
from modellink.kernels.messages import note

TRACKER = "latest_checkpointed_iteration.txt"
FOLDER = re.compile(r"iter_(\d{7,})$")


def iteration_folder(iteration: int) -> str:
    """Return the name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def iteration_number(folder: Path) -> int | None:
    """Return the iteration of such a folder; None for any other name."""
    match = FOLDER.match(folder.name)
    return int(match[1]) if match else None


def tracked(root: Path) -> str | None:
    """Return the content of the tracker file: a number, `release`, or None without one."""
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    return tracker.read_text(encoding="utf-8", errors="replace").strip()


def complete_iterations(root: Path) -> list[int]:
    """Return the numbers of our complete iterations in `root`, which may not exist."""
    return sorted(number for path in root.glob("iter_*")
                  if (number := iteration_number(path)) is not None and (path / MARKER).exists()
                  and incomplete(path) is None)


def last_complete(root: Path, iteration: int | None = None, *, ours: bool = False) -> Path:
    """Return the folder of the last complete iteration in `root`, or of the requested one.

    Args:
        ours: the checkpoint is known to be ours, so a folder without a marker is not complete.

    Raises:
        ModelLinkError: no iteration, or not the requested one, is complete; the reasons are listed.
    """
    found = {int(match[1]): path for path in root.glob("iter_*") if path.is_dir()
             and (match := FOLDER.match(path.name))}
    ours = ours or any((path / MARKER).exists() for path in found.values())
    named = tracked(root)
    if named == "release" and (root / "release").is_dir() and iteration is None:
        return root / "release"
    if iteration is not None:
        found = {number: path for number, path in found.items() if number == iteration}
    reasons = [f"{path.name}: writing it did not finish" for path in sorted(root.glob("iter_*.tmp"))]
    for number, path in sorted(found.items(), reverse=True):
        foreign = not ours and (named == str(number) or iteration == number)
        reason = None if foreign else incomplete(path)
        if reason is None:
            for skipped in reasons:
                note(f"skipped {skipped}; using {path.name}")
            return path
        reasons.append(f"{path.name}: {reason}")
    wanted = "complete iteration" if iteration is None else f"complete iteration {iteration}"
    raise ModelLinkError(f"no {wanted} was found" + "".join(f"\n  {skipped}" for skipped in reasons), where=root,
                         fix=None if named else f"a checkpoint of another program needs its {TRACKER}, or "
                                                f"--iteration")
