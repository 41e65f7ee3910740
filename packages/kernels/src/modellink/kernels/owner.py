# SPDX-License-Identifier: Apache-2.0
"""One writer per output: an owner file names the process that writes a folder or a set of files, and refuses a second one.

It works on shared file systems without locks: only exclusive creation (O_EXCL) has to be atomic. The owner touches its file at
an interval (the heartbeat). An owner on the same machine is gone if its process is. An owner elsewhere is gone if its file is
not touched for `LIMIT` seconds, which the second process waits for; clocks of two machines are not compared. The file of an
owner that is gone is replaced by the one process that created the guard file of exactly that owner, so of two processes that
find it at the same moment at most one wins.

Not here: complete or absent files (files.py). Readers need no owner.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import note

INTERVAL, LIMIT = 20.0, 120.0  # seconds between heartbeats, and without one after which an owner elsewhere is gone
CERTAIN = 3600.0  # a heartbeat as old as this is not explained by clocks that differ
INCOMPLETE_LIMIT = 5.0  # LIMIT for a file that its owner did not finish writing
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Record:
    """What an owner file says about its process.

    Attributes:
        place: the machine since its start, and its process namespace: where `pid` is valid. Host names may repeat.
        started: start time of the process in clock ticks since the start of the machine; 0 if unknown.
        since: when it took the file, in UTC.
    """

    host: str
    place: str
    pid: int
    started: int
    since: str
    command: str
    token: str

    def __str__(self) -> str:
        if not self.pid:
            return "an unknown process"
        return f"process {self.pid} ({self.command}) on {self.host} since {self.since} UTC"


class Owner:
    """The owner file of a target, held by this process.

    Args:
        path: of the owner file.
        record: what it says.
        made: folders that were created for it, the innermost first; those that are still empty are removed with it.
    """

    def __init__(self, path: Path, record: Record, made: Sequence[Path] = ()) -> None:
        self.path, self.token, self._made = path, record.token, made
        self._process, self._ended = os.getpid(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the file is missing or belongs to another process."""
        held = _read(self.path)
        return held is None or held.token != self.token

    def check(self) -> None:
        """Raise ModelLinkError if this process is not the owner any more."""
        held = _read(self.path)
        if held is None:
            raise ModelLinkError("the owner file of this process was removed, so another process may write here",
                                 where=self.path, fix="start again; remove no files of a process that is running")
        if held.token != self.token:
            raise ModelLinkError(f"{held} has taken over this output", where=self.path,
                                 fix="continue with only one of the two")

    def release(self) -> None:
        """Remove the file, if it is still of this process."""
        if self._ended.is_set() or os.getpid() != self._process:  # a forked child owns nothing
            return
        self._ended.set()
        with contextlib.suppress(ModelLinkError, OSError), _guard(self.path, self.token):
            if not self.lost:
                self.path.unlink()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL):
            with contextlib.suppress(OSError):  # the next check reports what is wrong
                if not self.lost:
                    os.utime(self.path)


def owner_file(target: Path | str, *, inside: bool = False) -> Path:
    """The owner file of `target`: a hidden file next to it, or `inside` a folder that is filled in place."""
    target = Path(target)
    return target / ".owner" if inside else target.with_name(f".{target.name}.owner")


def token_of(path: Path) -> str | None:
    """The token of the present owner. None: there is no owner file."""
    held = _read(path)
    return None if held is None else held.token


@contextmanager
def owned(target: Path | str, *, inside: bool = False, wait: bool = False) -> Iterator[Owner]:
    """Be the only writer of `target` within the block.

    Args:
        inside: the owner file is in the folder `target`, which is created. Default: next to `target`.
        wait: wait for another owner instead of refusing.

    Raises:
        ModelLinkError: another process is writing `target`.
    """
    owner = take(owner_file(target, inside=inside), wait=wait)
    try:
        yield owner
    finally:
        owner.release()


def take(path: Path, *, wait: bool = False, after: str | None = None) -> Owner:
    """Create the owner file `path`, replacing that of a process that is gone; the caller releases it.

    Args:
        wait: wait for another owner instead of refusing.
        after: the token of an owner that is known to be gone.

    Raises:
        ModelLinkError: another process owns it, or it cannot be written.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    told = False
    while True:
        try:
            return Owner(path, _acquire(path, after), made)
        except OSError as error:
            raise ModelLinkError(f"the output cannot be written: {error.strerror}", where=path.parent,
                                 fix="choose another place, or make this one writable") from None
        except _Held as error:
            if not wait:
                raise
            if not told:
                told = True
                note(f"{error.what}: waiting until it has ended")
            time.sleep(POLL)


class _Held(ModelLinkError):
    """Another process owns the output."""


def _acquire(path: Path, after: str | None = None) -> Record:
    mine = _record()
    while not _create(path, mine):
        held = _read(path)
        if held is None:  # released at this moment
            continue
        if held.token != after and not _is_gone(path, held):
            raise _Held(f"{held} is writing to this output", where=path,
                        fix="wait until it has ended, or choose another output")
        with _guard(path, held.token):
            if (now := _read(path)) is not None and now.token == held.token:
                path.unlink()
    for guard in path.parent.glob(f"{glob.escape(path.name)}.*"):  # guards of former owners, left by kills
        if not guard.name.startswith(f"{path.name}.{mine.token[:12]}"):
            guard.unlink(missing_ok=True)
    return mine


@contextmanager
def _guard(path: Path, token: str) -> Iterator[None]:
    """Be the only process that may remove the owner file with this token."""
    guard = path.with_name(f"{path.name}.{token[:12]}")
    mine = _acquire(guard)
    try:
        yield
    finally:
        held = _read(guard)
        if held is not None and held.token == mine.token:
            guard.unlink(missing_ok=True)


def _create(path: Path, record: Record) -> bool:
    """Create the file unless it exists; returns whether this process did. A missing folder is created first."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except FileNotFoundError:  # also if an owner that ends has just removed the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        return False
    try:
        os.write(handle, json.dumps(asdict(record)).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    written = _read(path)  # another record if this process slept for longer than INCOMPLETE_LIMIT
    return written is not None and written.token == record.token


def _read(path: Path) -> Record | None:
    """The record of an owner file; an unknown process if the file is not complete. None: there is no file."""
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 16)
    except FileNotFoundError:
        return None
    try:
        given = json.loads(data)
        record = Record(**given)
        if any(type(value) is not type(getattr(_UNKNOWN, field.name))
               for field in fields(Record) for value in [getattr(record, field.name)]):
            raise ValueError
        return record
    except (ValueError, TypeError):
        return Record("", "", 0, 0, "", "", hashlib.sha256(data).hexdigest())


_UNKNOWN = Record("", "", 0, 0, "", "", "")


def _is_gone(path: Path, held: Record) -> bool:
    """Whether the owner is gone; waits for a heartbeat of an owner elsewhere whose last one is recent."""
    if held.pid and held.place == _place():
        started = _started(held.pid)
        return started is None or bool(held.started and started and started != held.started)
    limit = LIMIT if held.pid else INCOMPLETE_LIMIT
    began, seen, waits = time.monotonic(), _touched(path), False
    while (beat := _touched(path)) is not None:
        if beat != seen or _read(path) != held:
            return False
        if time.monotonic() - began > limit or time.time() - beat > CERTAIN:
            return True
        if not waits:
            waits = True
            note(f"waiting up to {limit:.0f} s for a sign of {held}, which wrote {path}")
        time.sleep(POLL)
    return True


def _touched(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _record() -> Record:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return Record(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()) or 0, now,
                  Path(sys.argv[0]).name or "python", uuid.uuid4().hex)


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """Start time of a running process in clock ticks; 0 if the system does not tell. None: it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0
