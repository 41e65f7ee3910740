# SPDX-License-Identifier: Apache-2.0
"""The finished parts of a run in PREFIX.parts/: one dataset per piece, and journals that record which parts are complete.

A run writes `journal.jsonl`, share i of N writes `journal.i-of-N.jsonl` and touches no files of the others. The run that joins
the shares reads all journals. Parts made from other inputs or options are not used. A part is written without waiting for the
disk; its checksum is in the journal and is verified before a later run uses it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from modellink.data_prep.indexed import checksum
from modellink.data_prep.pieces import Done, Job
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import Journal
from modellink.kernels.messages import note
from modellink.kernels.progress import Work

Share = tuple[int, int]
READERS = 4  # threads


def suffix(share: Share | None) -> str:
    return "" if share is None else f".{share[0]}-of-{share[1]}"


@contextmanager
def alone(parts: Path, share: Share | None, *, show: bool) -> Iterator[None]:
    """Allow one run at a time on the parts, or on a share of them; the lock ends with the process.

    Shares hold `lock` in shared mode, the run that joins them in exclusive mode. The folder is removed if it is empty at the end.

    Raises:
        ModelLinkError: another run is active.
    """
    parts.mkdir(exist_ok=True)
    wanted = [("lock", fcntl.LOCK_EX)] if share is None else [("lock", fcntl.LOCK_SH), (f"lock{suffix(share)}", fcntl.LOCK_EX)]
    try:
        with ExitStack() as stack:
            for name, kind in wanted:
                # Open for reading and writing: NFS turns these into fcntl locks, and a shared lock requires a readable file.
                file = stack.enter_context((parts / name).open("a+"))
                _lock(file, kind, parts / name, show=show and name == "lock")
            yield
    finally:
        with suppress(OSError):  # the folder is not empty
            parts.rmdir()  # only now: on NFS a removed file stays in its folder until it is closed


def _lock(file: IO[str], kind: int, path: Path, *, show: bool) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ModelLinkError("another run is writing this output", where=path, fix="wait until it ends") from None
    except OSError as error:  # Lustre mounted without flock, some network disks
        if show:
            note(f"{path.parent} does not support locks ({error.strerror}): make sure that no two runs write one output")


def clear(parts: Path) -> None:
    """Empty the folder: parts before the journals that record them, locks last."""
    for path in sorted(parts.iterdir()):
        path.unlink()


def open_journal(parts: Path, share: Share | None, made_from: dict[str, Any], *, overwrite: bool, show: bool) -> Journal:
    """Open the journal of this run; it is emptied if its parts were made from other inputs or options.

    Raises:
        ModelLinkError: finished shares were made from other inputs or options, and `overwrite` is not set.
    """
    if share is None and not overwrite:
        _refuse_foreign_shares(parts, made_from)
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
            note(f"starting over: the unfinished run here had {_difference(before, made_from)}")
    if share is None:
        for path in parts.glob(".*.tmp"):
            path.unlink()
    return journal


def date_before(parts: Path, made_from: dict[str, Any]) -> str | None:
    """Return the date in the texts of the run or share that this one resumes: everything but the date must be equal."""
    for path in sorted(parts.glob("journal*.jsonl")):
        before = _first_entry(path).get("made_from", {})
        if before | {"date": None} == made_from:
            return str(before["date"])
    return None


def _first_entry(path: Path) -> dict[str, Any]:
    """Read a journal without opening it for writing: another run may be writing it."""
    with path.open("rb") as file:
        line = file.readline()
    with suppress(ValueError):
        return dict(json.loads(line))
    return {}


def entries_of_shares(parts: Path, made_from: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the journal entries of the shares of this work."""
    return [entry for _, entries in _shares(parts) if entries[0].get("made_from") == made_from for entry in entries]


def noted(entries: list[dict[str, Any]], job: Job) -> dict[int, Done]:
    """Return the recorded pieces that the job can use: without bad rows if those must fail, and verified if required."""
    pieces = [Done(**entry) for entry in entries if "piece" in entry]
    return {done.piece: done for done in pieces if (job.skip_bad_rows or not done.skipped) and (done.verified or not job.verify)}


def finished(parts: Path, noted: dict[int, Done], *, show: bool) -> dict[int, Done]:
    """Return the recorded pieces whose files have the recorded checksums."""
    if not noted:
        return {}
    found: dict[int, Done] = {}
    with Work("checking finished pieces", len(noted), unit="pieces", show=show) as work, ThreadPoolExecutor(READERS) as pool:
        for done, whole in zip(noted.values(), pool.map(partial(_is_whole, parts), noted.values()), strict=True):
            found |= {done.piece: done} if whole else {}
            work.advance()
    return found


def _is_whole(parts: Path, done: Done) -> bool:
    return all(checksum(parts / name) == noted for name, noted in done.checksums.items())


def _shares(parts: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Return the journals of the shares that were started."""
    for path in sorted(parts.glob("journal.*-of-*.jsonl")):
        with Journal(path) as journal:
            if journal.entries:
                yield path, journal.entries


def _made_from(journal: Journal) -> dict[str, Any] | None:
    return journal.entries[0].get("made_from", {}) if journal.entries else None


def _difference(before: dict[str, Any], made_from: dict[str, Any]) -> str:
    return ", ".join(f"another {name}" for name, value in made_from.items() if before.get(name) != value)


def _refuse_foreign_shares(parts: Path, made_from: dict[str, Any]) -> None:
    """Refuse to join shares with other options: a forgotten option must not discard the work of other machines."""
    for path, entries in _shares(parts):
        before = entries[0].get("made_from", {})
        if before != made_from and len(entries) > 1:
            raise ModelLinkError(f"a share of this output was made with {_difference(before, made_from)}", where=path,
                                 fix="give all shares and the run that joins them the same options, or discard their work "
                                 "with --overwrite")


def _remove_foreign(parts: Path, made_from: dict[str, Any]) -> None:
    """Remove the files of another run, unless shares of this run have parts there too."""
    if entries_of_shares(parts, made_from):
        return
    for path in parts.iterdir():
        if not path.name.startswith("lock"):
            path.unlink()
