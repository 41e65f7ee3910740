# SPDX-License-Identifier: Apache-2.0
"""Replicas: servers of the same model that a server in front (front.py) forwards requests to.

A local replica is a process (with `--tp` a group of processes) that runs the full server on its own port with
its share of the accelerators. It is restarted when it exits, unless its options are wrong. Other replicas are
servers that were started elsewhere.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import httpx

from modellink.core.launch import free_port
from modellink.kernels.errors import USER_MISTAKE, ModelLinkError

# seconds before a replica is restarted; doubled each time it exits early
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
EARLY = 60.0  # seconds
# seconds between health checks of a replica that is not ready, and of one that is
POLL, POLL_READY = 0.2, 2.0
HEALTH_TIMEOUT = 10.0  # seconds
STOP_TIMEOUT = 40.0  # seconds
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}


class Replica:
    """A server that was started elsewhere.

    Attributes:
        url: without a path.
        active: number of requests it is working on.
        ready: it passed its last health check.
        was_ready: it has passed one.
        refused: it exited because its options are wrong; a restart would not help.
    """

    def __init__(self, index: int, url: str) -> None:
        self.index, self.url = index, url
        self.active = 0
        self.ready = self.was_ready = self.refused = False

    async def run(self, client: httpx.AsyncClient) -> None:
        """Watch over the replica until cancelled; returns only if it can never be ready."""
        await self._watch(client)

    async def stop(self) -> None:
        """Called when the server in front stops."""

    async def _watch(self, client: httpx.AsyncClient) -> None:
        while True:
            try:
                ready = (await client.get(f"{self.url}/health", timeout=HEALTH_TIMEOUT)).status_code == 200
            except httpx.HTTPError:
                ready = False
            if ready != self.ready:
                self.ready = ready
                self.was_ready |= ready
                state = "is ready" if ready else "does not respond"
                print(f"replica {self.index} at {self.url} {state}", file=sys.stderr, flush=True)
            await asyncio.sleep(POLL_READY if ready else POLL)


class LocalReplica(Replica):
    """A replica in a child process."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__(index, "")
        self._command, self._environment = command, environment
        self.process: asyncio.subprocess.Process | None = None

    async def run(self, client: httpx.AsyncClient) -> None:
        """Start the process, and restart it whenever it exits, until cancelled or `refused`."""
        wait = FIRST_WAIT
        while True:
            port, since = free_port(), time.monotonic()
            self.url = f"http://127.0.0.1:{port}"
            command = [*self._command, "--host", "127.0.0.1", "--port", str(port)]
            self.process = await asyncio.create_subprocess_exec(
                *command, env=self._environment, start_new_session=True, preexec_fn=_end_with_parent)
            watch = asyncio.ensure_future(self._watch(client))
            try:
                status = await self.process.wait()
            finally:
                watch.cancel()
                self.ready = False
            self.refused = status == USER_MISTAKE and not self.was_ready
            if self.refused:
                return
            wait = min(2 * wait, LONGEST_WAIT) if time.monotonic() - since < EARLY else FIRST_WAIT
            print(f"replica {self.index} ended with status {status}; it restarts in {wait:.0f} s",
                  file=sys.stderr, flush=True)
            await asyncio.sleep(wait)

    async def stop(self) -> None:
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            process.kill()
            await process.wait()


def make_replicas(count: int, arguments: Sequence[str],
                  shares: Sequence[dict[str, str]] | None = None) -> list[Replica]:
    """Return replicas that run `modellink-infer` with these arguments.

    Args:
        shares: environment variables of each replica that select its accelerators, see `device_shares`.
            Without accelerators, the replicas share the processor cores and the free memory.
    """
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ,
                   "MODELLINK_REPLICAS": "1" if shares else str(count)}
    command = [sys.executable, "-m", "modellink.infer.cli", *arguments, "--replicas", "1"]
    return [LocalReplica(index, command, environment | (shares[index] if shares else {}))
            for index in range(count)]


def device_shares(kind: str, available: int, count: int, ranks: int) -> list[dict[str, str]] | None:
    """Return the environment variables that give each of `count` replicas its accelerators; None on a CPU.

    Args:
        available: accelerators that this process sees; if the variable is set, those that it names.
        ranks: of each replica.

    Raises:
        ModelLinkError: there are too few accelerators.
    """
    if (variable := VISIBLE.get(kind)) is None:
        return None
    names = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    names = names or [str(number) for number in range(available)]
    if len(names) < count * ranks:
        raise ModelLinkError(f"{count} replicas of {ranks} ranks need {count * ranks} devices, {len(names)} "
                             "are available",
                             where="--replicas", fix=f"use at most {len(names) // ranks} replicas")
    return [{variable: ",".join(names[index * ranks:(index + 1) * ranks])} for index in range(count)]


def _end_with_parent() -> None:
    """Let the child process exit when the server in front is killed (Linux)."""
    prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)
