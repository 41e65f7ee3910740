# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a run on this machine and waits for them. Imports no torch.

Not here: the process groups, which each rank joins (processes.py), and runs with high availability (resilience/agent.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from modellink.kernels.errors import OUR_FAULT, USER_MISTAKE
from modellink.kernels.messages import for_ranks
from modellink.kernels.messages import rank as rank
from modellink.kernels.terminal import above_a_line

LIFELINE = "MODELLINK_LIFELINE"
"""Environment variable with the number of a pipe that closes when the launcher is gone."""
START = "MODELLINK_START"
"""Environment variable with the number of this start of a run with high availability, set by its agent."""
GRACE = 10.0  # seconds that the other ranks have to report an error after one has failed
GRACE_AFTER_MISTAKE = 1.5  # the same after a user's mistake, which one rank reports for all


def under_launcher() -> bool:
    """Whether this process is one of several that torchrun or `spawn` started."""
    return "RANK" in os.environ


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def spawn(count: int, module: str, arguments: Sequence[str], forward: Sequence[signal.Signals] = ()) -> int:
    """Run `python -m module arguments` as `count` ranks on this machine and wait for them.

    Rank 0 keeps the terminal; the error output of the others is shown if they fail and rank 0 does not. When one rank
    dies the others are stopped. Signals in `forward` are passed on to rank 0 instead of ending this process.

    Returns:
        0, or the exit status of the rank that failed first.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))} | for_ranks()
    lifeline, ours = os.pipe()  # its end tells the ranks that this process is gone, however it ended
    environment[LIFELINE] = str(lifeline)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        logs: list[IO[str] | None] = [None]
        logs += [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count - 1)]
        ranks = [subprocess.Popen([sys.executable, "-m", module, *arguments], stderr=log, pass_fds=(lifeline,),
                                  env=environment | {"RANK": str(number), "LOCAL_RANK": str(number)})
                 for number, log in enumerate(logs)]
        os.close(lifeline)
        for forwarded in forward:
            signal.signal(forwarded, lambda number, _: ranks[0].send_signal(number))
        try:
            failed = _wait(ranks)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if failed is None:
            return 0
        with above_a_line():
            return _report([process.returncode for process in ranks], logs, failed)


def _report(codes: list[int], logs: Sequence[IO[str] | None], failed: int) -> int:
    """Print the errors of the ranks that know the cause; the exit status of the run."""
    mistake = USER_MISTAKE in codes
    if mistake:  # the rank that found it has reported it; the others only lost a peer
        failed = codes.index(USER_MISTAKE)
    for number, log in enumerate(logs):  # the cause may be on another rank: then rank 0 only reports that it lost a peer
        if log is not None and (number == failed or (codes[number] == OUR_FAULT and not mistake)):
            log.seek(0)
            print(f"rank {number} failed:\n{log.read()[-4000:]}", file=sys.stderr)
    status = codes[failed]
    if status < 0:
        print(f"rank {failed} was killed by {signal.Signals(-status).name}", file=sys.stderr)
    return status if status > 0 else 1


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks have ended well (None) or one has failed (its number), with time for all to report."""
    while True:
        states = [process.poll() for process in ranks]
        bad = [number for number, state in enumerate(states) if state not in (None, 0)]
        if bad:
            since = time.monotonic()
            while None in (codes := [process.poll() for process in ranks]):
                grace = GRACE_AFTER_MISTAKE if USER_MISTAKE in codes else GRACE
                if time.monotonic() - since > grace:
                    break
                time.sleep(0.05)
            return 0 if ranks[0].poll() not in (None, 0) else bad[0]
        if all(state == 0 for state in states):
            return None
        time.sleep(0.05)
