"""What is finished of a run, in PREFIX.parts/: a dataset a piece, and journals that say which of them to trust.

A run has `journal.jsonl`; the i-th of N shares has `journal.i-of-N.jsonl` and touches nothing of the others. The run that joins
them reads all journals. Parts made from other inputs or options are not used. A part is written without waiting for the disk;
its checksum is in the journal, and is compared before a later run uses it.
"""

from __future__ import annotations

import fcntl
import json
import sys
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
from modellink.kernels.progress import Work

Share = tuple[int, int]
READERS = 4  # threads


def suffix(share: Share | None) -> str:
    return "" if share is None else f".{share[0]}-of-{share[1]}"


@contextmanager
def alone(parts: Path, share: Share | None, *, show: bool) -> Iterator[None]:
    """One run at a time on the parts, or on a share of them; a lock is its process's and vanishes with it.

    All shares hold `lock` together, the run that joins them holds it alone. The folder goes when nothing was left in it.

    Raises:
        ModelLinkError: another run is at work.
    """
    parts.mkdir(exist_ok=True)
    wanted = [("lock", fcntl.LOCK_EX)] if share is None else [("lock", fcntl.LOCK_SH), (f"lock{suffix(share)}", fcntl.LOCK_EX)]
    try:
        with ExitStack() as stack:
            for name, kind in wanted:
                # Read and write: NFS makes fcntl locks of these, and a shared one wants a file that is open for reading.
                file = stack.enter_context((parts / name).open("a+"))
                _lock(file, kind, parts / name, show=show and name == "lock")
            yield
    finally:
        with suppress(OSError):  # there is something left
            parts.rmdir()  # only now: on NFS a file that is removed stays in its folder until it is closed


def _lock(file: IO[str], kind: int, path: Path, *, show: bool) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ModelLinkError("another run is writing this output", where=path, fix="wait for it to end") from None
    except OSError as error:  # Lustre mounted without flock, some network disks
        if show:
            print(f"note: {path.parent} has no locks ({error.strerror}): see to it yourself that no two runs write one output",
                  file=sys.stderr)


def clear(parts: Path) -> None:
    """Remove all that is in the folder: parts before the journals that tell of them, locks last."""
    for path in sorted(parts.iterdir()):
        path.unlink()


def open_journal(parts: Path, share: Share | None, made_from: dict[str, Any], *, overwrite: bool, show: bool) -> Journal:
    """The journal of this run, empty when what it tells of was made from something else.

    Raises:
        ModelLinkError: what shares have finished was made from something else, and is not to be overwritten.
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
            print(f"starting anew: the unfinished run here had {_difference(before, made_from)}", file=sys.stderr)
    if share is None:
        for path in parts.glob(".*.tmp"):
            path.unlink()
    return journal


def date_before(parts: Path, made_from: dict[str, Any]) -> str | None:
    """The date in texts of the run, or of a share, that this one goes on with: all but the date is the same."""
    for path in sorted(parts.glob("journal*.jsonl")):
        before = _first_entry(path).get("made_from", {})
        if before | {"date": None} == made_from:
            return str(before["date"])
    return None


def _first_entry(path: Path) -> dict[str, Any]:
    """Only looked at: another run may be writing."""
    with path.open("rb") as file:
        line = file.readline()
    with suppress(ValueError):
        return dict(json.loads(line))
    return {}


def entries_of_shares(parts: Path, made_from: dict[str, Any]) -> list[dict[str, Any]]:
    """What the shares of this very work have noted."""
    return [entry for _, entries in _shares(parts) if entries[0].get("made_from") == made_from for entry in entries]


def noted(entries: list[dict[str, Any]], job: Job) -> dict[int, Done]:
    """Pieces that are told of and that the job can use: none with bad rows when those must fail, and none unverified."""
    pieces = [Done(**entry) for entry in entries if "piece" in entry]
    return {done.piece: done for done in pieces if (job.skip_bad_rows or not done.skipped) and (done.verified or not job.verify)}


def finished(parts: Path, noted: dict[int, Done], *, show: bool) -> dict[int, Done]:
    """Of the noted pieces those whose files are there as they were noted."""
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
    """The journals of shares that have begun."""
    for path in sorted(parts.glob("journal.*-of-*.jsonl")):
        with Journal(path) as journal:
            if journal.entries:
                yield path, journal.entries


def _made_from(journal: Journal) -> dict[str, Any] | None:
    return journal.entries[0].get("made_from", {}) if journal.entries else None


def _difference(before: dict[str, Any], made_from: dict[str, Any]) -> str:
    return ", ".join(f"another {name}" for name, value in made_from.items() if before.get(name) != value)


def _refuse_foreign_shares(parts: Path, made_from: dict[str, Any]) -> None:
    """An option forgotten in the run that joins must not throw away what other machines worked on."""
    for path, entries in _shares(parts):
        before = entries[0].get("made_from", {})
        if before != made_from and len(entries) > 1:
            raise ModelLinkError(f"a share of this output was made with {_difference(before, made_from)}", where=path,
                                 fix="give all shares and the run that joins them the same options, or throw their work away "
                                 "with --overwrite")


def _remove_foreign(parts: Path, made_from: dict[str, Any]) -> None:
    """Remove what another run left, unless shares of this one have parts there too."""
    if entries_of_shares(parts, made_from):
        return
    for path in parts.iterdir():
        if not path.name.startswith("lock"):
            path.unlink()
