# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of this machine, and restarts them when one fails, after the others have saved the training state.

Based on torch.distributed.elastic's agent, with its rendezvous and a store that outlives rank 0; as shipped it stops all ranks as
soon as one fails. A run on several machines lives as long as the machine of its endpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from modellink.core import launch, processes
from modellink.core.resilience.watch import PEER_FAILED, SAVING, WATCHED, Failure, report, wait_for
from modellink.core.run import Run
from modellink.kernels.errors import OUR_FAULT, USER_MISTAKE
from modellink.kernels.messages import for_ranks, note
from modellink.kernels.terminal import above_a_line

GRACE = 5.0  # seconds for the remaining ranks after the first of them has saved and exited
AGREEING = 90.0  # seconds in which survivors on other machines agree on a plan


class Agent(LocalElasticAgent):
    """The agent of one machine.

    Args:
        fewer: the next smaller possible number of ranks on this machine; None if no smaller number works.
        saved: identifies the last checkpoint, to detect progress between failures.
    """

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, fewer: Callable[[int], int | None],
                 saved: Callable[[], object]) -> None:
        super().__init__(spec, logs)
        self._fewer, self._saved = fewer, saved
        self._failed_before: tuple[object, object] | None = None
        self.status = 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        group: Any = worker_group  # its ranks are known now
        shared, own = self._keys(), group.store
        if group.group_rank == 0:
            own.set("start", str(shared.add("starts", 1)))
        os.environ[launch.START] = own.get("start").decode()

    def _keys(self, prefix: str = "") -> Any:
        group: Any = self._worker_group
        store = dist.TCPStore(group.master_addr, int(group.master_port), is_master=False)
        return dist.PrefixStore(prefix, store) if prefix else store

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        signal.signal(signal.SIGTERM, self._forward)
        return started

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Pass a signal to rank 0, which makes all ranks save before they exit."""
        assert self._pcontext is not None
        os.kill(self._pcontext.pids()[0], number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if any(self._codes().values()):
            self._wait_for_survivors()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._judge(result)
        return result

    def _codes(self) -> dict[int, int | None]:
        """Exit status by local rank; None while it runs."""
        return {rank: handler.proc.poll() for rank, handler in self._handlers().items()}

    def _handlers(self) -> dict[int, Any]:
        context: Any = self._pcontext
        handlers: dict[int, Any] = context.subprocess_handlers
        return handlers

    def _wait_for_survivors(self) -> None:
        store = self._keys(processes.keys(self._generation()))
        first = self._worker_group.workers[0].global_rank
        watched = store.check([WATCHED])  # otherwise it failed at startup, and there is nothing to save
        deadline, reported, gone = time.monotonic() + (SAVING if watched else GRACE), 0, 0
        while time.monotonic() < deadline:
            codes = self._codes()
            dead = [first + rank for rank, code in codes.items() if code not in (None, 0, PEER_FAILED)]
            if len(dead) > reported:
                reported = len(dead)
                report(store, Failure(f"rank {', '.join(map(str, dead))} is gone", dead=dead))
            ended = [code for code in codes.values() if code is not None]
            if len(ended) == len(codes):
                break
            if PEER_FAILED in ended and len(ended) > gone:
                deadline, gone = time.monotonic() + GRACE, len(ended)
            time.sleep(0.1)
        for handler in self._handlers().values():  # a hanging rank does not react to SIGTERM
            if handler.proc.poll() is None:
                handler.proc.kill()
        if (self._worker_group.group_world_size or 1) > 1 and wait_for(store, "plan", AGREEING):
            wait_for(store, "over", SAVING)  # a machine that restarts makes the others restart

    def _generation(self) -> int:
        return int(self._keys(processes.keys(0)).add("generation", 0))

    def _judge(self, result: RunResult) -> None:
        """Decide about the next start after a failure."""
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        self.status = USER_MISTAKE if USER_MISTAKE in codes.values() else OUR_FAULT
        if self.status == USER_MISTAKE:  # a restart would fail in the same way
            self._remaining_restarts = 0
        causes = [rank for rank, code in codes.items() if code != PEER_FAILED] or sorted(codes)
        now = (causes[0], self._saved())
        again = f"; restarting, at most {self._remaining_restarts} more times" if self._remaining_restarts else ""
        note(f"rank {causes[0]} ended with {_status_text(codes[causes[0]])}{again}")
        if now == self._failed_before and (count := self._fewer(self._worker_group.spec.local_world_size)) is not None:
            note(f"it failed twice without progress: restarting with {count} ranks")
            self._worker_group.spec.local_world_size = count
        self._failed_before = now


def _status_text(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def run_agent(run: Run, module: str, arguments: Sequence[str], fewer: Callable[[int], int | None],
           saved: Callable[[], object]) -> int:
    """Run `python -m module arguments` as the ranks of this machine until they succeed or restarts are used up.

    Returns:
        The exit status.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are reported here
    low, high = run.resilience.nodes
    count = run.parallel.nproc_per_node or run.parallel.processes()
    endpoint = run.resilience.rdzv_endpoint or f"127.0.0.1:{launch.free_port()}"
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ |= for_ranks()
    with tempfile.TemporaryDirectory() as logs:
        handler = get_rendezvous_handler(RendezvousParameters(
            backend="c10d", endpoint=endpoint, run_id=run.resilience.rdzv_id, min_nodes=low, max_nodes=high,
            local_addr="127.0.0.1" if high == 1 else None, last_call_timeout=5))
        spec = WorkerSpec(role="rank", local_world_size=count, entrypoint=sys.executable, args=("-m", module, *arguments),
                          rdzv_handler=handler, max_restarts=run.resilience.max_restarts, monitor_interval=0.1)
        agent = Agent(spec, DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, count), Std.ERR)), fewer, saved)
        try:
            result = agent.run()
        finally:
            handler.shutdown()
        if not result.is_failed():
            return 0
        with above_a_line():
            for failure in result.failures.values():
                _show(Path(logs), failure.local_rank)
        return agent.status or OUR_FAULT


def _show(logs: Path, rank: int) -> None:
    for path in sorted(logs.glob(f"**/{rank}/stderr.log"))[-1:]:
        if text := path.read_text("utf-8", "replace")[-4000:]:
            print(f"rank {rank} failed:\n{text}", file=sys.stderr)
