"""What is finished of a run, in PREFIX.parts/: a dataset a piece, and journals that say which of them to trust.

A run has `journal.jsonl`; the i-th of N shares has `journal.i-of-N.jsonl` and touches nothing of the others. The run that joins
them reads all journals. Parts made from other inputs or options are not used.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from modellink.data_prep.tokenise import Done
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import Journal

Share = tuple[int, int]


def suffix(share: Share | None) -> str:
    return "" if share is None else f".{share[0]}-of-{share[1]}"


@contextmanager
def alone(parts: Path, share: Share | None) -> Iterator[None]:
    """One run at a time on the parts, or on a share of them; a lock is its process's and vanishes with it.

    Raises:
        ModelLinkError: another run is at work.
    """
    parts.mkdir(exist_ok=True)
    own = parts / f"lock{suffix(share)}"
    with ExitStack() as stack:
        for path in [own, *(parts.glob("lock.*") if share is None else [])]:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ModelLinkError("another run is writing this output", where=path, fix="wait for it to end") from None
        yield


def open_journal(parts: Path, share: Share | None, made_from: dict[str, Any], *, show: bool) -> Journal:
    """The journal of this run, empty when what it tells of was made from something else."""
    path = parts / f"journal{suffix(share)}.jsonl"
    journal = Journal(path)
    before = _made_from(journal)
    if before != made_from:
        journal.close()
        if share is None:
            _remove_foreign(parts, made_from)
        path.unlink(missing_ok=True)
        journal = Journal(path)
        journal.append({"made_from": made_from})
        if before is not None and show:
            changed = [name for name, value in made_from.items() if before.get(name) != value]
            print(f"starting anew: the unfinished run here had another {', another '.join(changed)}", file=sys.stderr)
    if share is None:
        for path in parts.glob(".*.tmp"):
            path.unlink()
    return journal


def entries_of_shares(parts: Path, made_from: dict[str, Any]) -> list[dict[str, Any]]:
    """What the shares of this very work have noted."""
    found: list[dict[str, Any]] = []
    for path in sorted(parts.glob("journal.*-of-*.jsonl")):
        with Journal(path) as journal:
            found += journal.entries if _made_from(journal) == made_from else []
    return found


def finished(parts: Path, entries: list[dict[str, Any]], *, skips_bad_rows: bool) -> dict[int, Done]:
    """Pieces whose files are there with the sizes that were noted; all, once they are merged.

    A piece with bad rows does not count when those must fail.
    """
    found = {}
    merged = any(entry.get("state") == "merged" for entry in entries)
    for entry in entries:
        if "piece" in entry:
            done = Done(**entry)
            files = {parts / name: size for name, size in done.sizes.items()}
            whole = merged or all(path.is_file() and path.stat().st_size == size for path, size in files.items())
            if whole and (skips_bad_rows or not done.skipped):
                found[done.piece] = done
    return found


def _made_from(journal: Journal) -> dict[str, Any] | None:
    return journal.entries[0].get("made_from", {}) if journal.entries else None


def _remove_foreign(parts: Path, made_from: dict[str, Any]) -> None:
    """Remove what another run left, unless shares of this one have parts there too."""
    if entries_of_shares(parts, made_from):
        return
    for path in parts.iterdir():
        if not path.name.startswith("lock"):
            path.unlink()
