"""Which iteration of a Megatron checkpoint folder counts.

Ours are complete when the marker inside lists files that are all there (kernels.files). A checkpoint made by Megatron or
by the original has no marker anywhere; there the tracker file decides. Anything else was not finished: it is passed over
with a note, and the last complete iteration is used.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import MARKER, incomplete

TRACKER = "latest_checkpointed_iteration.txt"
FOLDER = re.compile(r"iter_(\d{7,})$")


def iteration_folder(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def tracked(root: Path) -> str | None:
    """What the tracker says: a number, `release`, or None without a tracker."""
    tracker = root / TRACKER
    return tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else None


def complete_iterations(root: Path) -> list[int]:
    """The numbers of ours that are complete below `root`, which may not exist."""
    return sorted(int(match[1]) for path in root.glob("iter_*")
                  if (match := FOLDER.match(path.name)) and (path / MARKER).exists() and incomplete(path) is None)


def last_complete(root: Path, iteration: int | None = None, *, ours: bool = False) -> Path:
    """The folder of the last complete iteration below `root`, or of the one asked for.

    Args:
        ours: the checkpoint is known to be ours, so that a folder without a marker is not complete.

    Raises:
        ModelLinkError: there is no complete iteration, or not the one asked for; it says why for each.
    """
    found = {int(match[1]): path for path in root.glob("iter_*") if path.is_dir() and (match := FOLDER.match(path.name))}
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
            for note in reasons:
                print(f"note: passed over {note}; using {path.name}", file=sys.stderr)
            return path
        reasons.append(f"{path.name}: {reason}")
    wanted = "complete iteration" if iteration is None else f"complete iteration {iteration}"
    raise ModelLinkError(f"there is no {wanted}" + "".join(f"\n  {note}" for note in reasons), where=root,
                         fix=None if named else f"a checkpoint made elsewhere needs its {TRACKER}, or --iteration")
