# SPDX-License-Identifier: Apache-2.0
"""A thread of each rank that learns of failures and frees its rank from collectives that cannot complete.

A signal cannot do this: Python handles signals after the collective returns. gloo cannot abort a collective, so its sockets are
shut down, which makes the collective fail; NCCL and HCCL can abort. Not here: the recovery (survivors.py, replay.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from modellink.kernels.messages import note

PERIOD = 0.25  # seconds between checks
SAVING = 1800.0  # seconds that a save of the survivors may take
FAILURE, WATCHED = "failure", "watched"  # keys
PEER_FAILED = 75
"""Exit status of a rank that ends because another one failed (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Failure:
    """A known failure; `dead` are the ranks that no longer exist."""

    what: str
    dead: list[int] = field(default_factory=list)
    repairable: bool = False


def connect(prefix: str = "") -> dist.Store:
    """The agent's store, which outlives all ranks, with keys under `prefix`."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          timeout=timedelta(minutes=10))
    return dist.PrefixStore(prefix, store) if prefix else store


def report(store: dist.Store, failure: Failure) -> None:
    """Report a failure to all ranks; the first report counts, later ones add dead ranks."""
    text = json.dumps(asdict(failure))
    found = store.compare_set(FAILURE, "", text).decode()
    if found != text:
        known = read(store)
        if known is not None and not set(failure.dead) <= set(known.dead):
            store.set(FAILURE, json.dumps(asdict(known) | {"dead": sorted({*known.dead, *failure.dead})}))


def read(store: dist.Store) -> Failure | None:
    if not store.check([FAILURE]):
        return None
    return Failure(**json.loads(store.get(FAILURE)))


def wait_for(store: dist.Store, key: str, seconds: float) -> bool:
    """Wait for a key; False on timeout."""
    end = time.monotonic() + seconds
    while not (there := bool(store.check([key]))) and time.monotonic() < end:
        time.sleep(0.1)
    return there


def sockets() -> set[str]:
    """The sockets of this process, by kernel inode."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if (target := str(entry.readlink())).startswith("socket:"):
                found.add(target)
    return found


class Watch:
    """Checks for failures periodically until `stop`.

    Args:
        rank: of this process.
        prefix: of the store's keys for these process groups.
        hang_timeout: seconds without `beat` after which this rank reports a failure.
    """

    def __init__(self, rank: int, prefix: str, hang_timeout: float) -> None:
        self.rank, self.hang_timeout = rank, hang_timeout
        self.failed = threading.Event()
        self._store, self._sockets = connect(prefix), sockets()  # later ones do not belong to the groups
        self._store.set(WATCHED, "yes")
        self._last, self._stopped = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Report that this rank is alive."""
        self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(PERIOD):
                if (silent := time.monotonic() - self._last) > self.hang_timeout:
                    report(self._store, Failure(f"no step for {silent:.0f} seconds, seen by rank {self.rank}"))
                if self._store.check([FAILURE]):
                    self.failed.set()
                    self._abort()
                    return
        except (RuntimeError, OSError):  # the store and thus the agent are gone, and nothing would restart this rank
            os._exit(1)

    def _abort(self) -> None:
        if not dist.is_initialized():  # this rank is exiting
            return
        if dist.get_backend() != "gloo":
            for group in list(dist.distributed_c10d._world.pg_map):
                group.abort()
            return
        port = int(os.environ["MASTER_PORT"])
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if str(entry.readlink()) not in self._sockets:
                    continue
                with socket.socket(fileno=os.dup(int(entry.name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername()[1] != port:
                        copy.shutdown(socket.SHUT_RDWR)


def leave(why: str | None = None) -> NoReturn:
    """Exit at once: the process groups are broken, and destroying them would wait for other ranks."""
    if why:
        note(why, every_rank=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(PEER_FAILED)


@contextlib.contextmanager
def end_with(store: dist.Store, ranks: Collection[int]) -> Iterator[None]:
    """Within the context, exit when one of `ranks` is gone.

    The others wait for it in a group that does not exist yet, and nothing else would notice.
    """
    met = threading.Event()

    def look() -> None:
        while not met.wait(PERIOD):
            if (failure := read(store)) is not None and (gone := sorted(set(ranks) & set(failure.dead))):
                store.set("over", "yes")
                leave(f"rank {gone[0]} is gone while the others wait for it: only the last checkpoint is left")
    looking = threading.Thread(target=look, name="end-with", daemon=True)
    looking.start()
    try:
        yield
    finally:
        met.set()
        looking.join()
