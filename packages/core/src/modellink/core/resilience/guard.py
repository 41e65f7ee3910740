# SPDX-License-Identifier: Apache-2.0
"""High availability around the training loop: repeats or completes steps, and saves what survives a failure."""

from __future__ import annotations

import contextlib
import resource
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

import torch.distributed as dist

from modellink.core import processes
from modellink.core.config.faults import read_faults
from modellink.core.resilience import survivors
from modellink.core.resilience.commit import Commit, StepAborted
from modellink.core.resilience.faults import Faults, RepairableFault
from modellink.core.resilience.rebuild import rebuild, take
from modellink.core.resilience.replay import LocalCopy
from modellink.core.resilience.watch import SAVING, Failure, Watch, connect, end_with, leave, report, wait_for
from modellink.core.run import Run
from modellink.core.train.finite import BadWeights, NotFinite
from modellink.core.train.guard import Guard, GuardFactory, NoGuard
from modellink.core.train.ownership import LostFolder, inherited
from modellink.core.train.random_state import random_state, set_random_state
from modellink.core.train.training import Training
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import note

NOTICED = 30.0  # seconds within which a failure elsewhere becomes known


class HighAvailability:
    """Guards a training, which it may rebuild in place.

    Args:
        save: writes a checkpoint of the training, for a run; every rank of the run calls it.
        advance: what a step does to the training after the weights have changed.
    """

    def __init__(self, run: Run, training: Training, save: Callable[[Run], None], advance: Callable[[], None]) -> None:
        self._run, self._training, self._save, self._advance = run, training, save, advance
        self._generation = 0
        self._watch_over()
        self._faults = Faults(read_faults(run.resilience.inject_fault), dist.get_rank(), connect("faults"))

    def _watch_over(self) -> None:
        """Start watching the present process groups and training."""
        prefix = processes.keys(self._generation)
        self._store = connect(prefix)
        if self._generation and dist.get_rank() == 0:
            connect(processes.keys(0)).add("generation", 1)
        self._watch = Watch(dist.get_rank(), prefix, self._run.resilience.hang_timeout)
        copied = self._run.resilience.enable_optimizer_state_local_copy
        self._copy = LocalCopy(self._training) if copied else None
        self._commit = Commit(self._training.optimizer, self._run.device.torch, self._well)
        self._random = random_state(self._training.device)

    def _well(self) -> bool:
        self._faults.strike(self._training.iteration + 1, "update", self._training.models)
        return self._copy is None or not self._copy.damaged()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):  # between two steps there is nothing to return to in this process
            self._survive(error, inside=False)
        self._watch.stop()

    def attempt(self, step: Callable[[], None]) -> None:
        number, again = self._training.iteration + 1, False
        while self._training.iteration < number:
            self._random = random_state(self._training.device)
            self._commit.begin(number)
            try:
                self._faults.strike(number, "start", self._training.models)
                step()
            except StepAborted:
                if again:
                    raise
                again = True
                self._say(f"step {number} is repeated: state that it must not change had changed on a rank")
                self._back()
            except NotFinite:
                if again:
                    raise
                again = True
                self._say(f"step {number} is repeated: its loss or a gradient is not finite")
                self._back()
            except Exception as error:
                self._survive(error)
        self._random = random_state(self._training.device)
        if self._copy is not None:
            self._copy.take()
        self._watch.beat()
        self._faults.strike(number, "end", self._training.models)

    def beat(self) -> None:
        self._watch.beat()

    def _back(self) -> None:
        """Return to the start of the step."""
        if self._copy is not None:
            self._copy.put_back()
        set_random_state(self._random, self._training.device)

    @contextlib.contextmanager
    def saving(self, *, last: bool) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self._faults.disk_is_full(self._training.iteration):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        try:
            with self.finishing(last=last):
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    @contextlib.contextmanager
    def finishing(self, *, last: bool) -> Iterator[None]:
        self._watch.beat()
        try:
            yield
        except ModelLinkError as error:  # on all ranks
            if last or isinstance(error, (BadWeights, LostFolder)):  # further steps would not repair them
                raise
            self._say(f"training continues without this checkpoint: {error.what}")
        self._watch.beat()

    def _say(self, what: str) -> None:
        note(what)

    def _survive(self, error: Exception, *, inside: bool = True) -> None:
        """Return once training is consistent again in this process; otherwise exit.

        Args:
            inside: the error occurred in a step that can be repeated.
        """
        rank = dist.get_rank()
        if isinstance(error, RepairableFault):
            report(self._store, Failure(f"rank {rank}: {error}", repairable=True))
        elif not (self._watch.failed.is_set() or processes.lost_peer(error)):
            report(self._store, Failure(f"rank {rank}: {type(error).__name__}: {error}", dead=[rank]))
            raise error
        if not self._watch.failed.wait(NOTICED):
            report(self._store, Failure(f"rank {rank} lost its peers: {error}"))
            self._watch.failed.wait(NOTICED)
        traceback.clear_frames(error.__traceback__)  # they hold activations
        run, training = self._run, self._training
        dp = survivors.fewest(run.layout, run.optimizer_instances, distributed=run.parallel.use_distributed_optimizer)
        state = survivors.RankState(training.iteration, self._commit.phase(training.iteration), survivors.place(),
                           inside and self._copy is not None)
        patience = min(run.resilience.hang_timeout, survivors.PATIENCE)
        plan = survivors.agree(self._store, rank, dist.get_world_size(), state, run.layout, dp, patience)
        if plan.action == "lost":
            self._store.set("over", "yes")
            leave(f"{plan.why}: only the last checkpoint is left" if rank == 0 else None)
        if rank not in plan.ranks:
            wait_for(self._store, "over", SAVING)
            leave()
        self._settle(plan.iteration, repaired=isinstance(error, RepairableFault))
        self._faults.strike(plan.iteration + 1, "repair", training.models)
        snapshot = take(training)
        self._generation += 1
        store = self._store
        with end_with(store, plan.ranks):
            again = rebuild(run, training, snapshot, plan.ranks, processes.keys(self._generation), plan.dp)
        if plan.action == "save":
            self._say(f"{plan.why}; the surviving ranks save iteration {plan.iteration}")
            try:
                with inherited(run.checkpoint.save):
                    self._save(again)
            finally:  # other machines wait for it
                store.set("over", "yes")
            leave()
        self._run = again
        self._watch_over()
        set_random_state(self._random, self._training.device)
        self._say(f"{plan.why}; training continues from iteration {plan.iteration}")

    def _settle(self, iteration: int, *, repaired: bool) -> None:
        """Bring the training of this rank to the end of `iteration`, restoring the copy first if its memory is damaged."""
        random, copy = self._random, self._copy
        unchanged = self._commit.phase(self._training.iteration) != "applying"
        if copy is not None and (repaired or (unchanged and copy.damaged())):  # the failure elsewhere may hide one here
            copy.put_back(gather=False)
        if self._training.iteration < iteration:
            self._commit.complete()
            self._advance()
            random = random_state(self._training.device)
        self._random = random


def guard(run: Run, training: Training, save: Callable[[Run], None], advance: Callable[[], None]) -> Guard:
    """The guard that a run asks for (see `GuardFactory`)."""
    kind: GuardFactory = HighAvailability if run.resilience.enable_high_availability else NoGuard
    return kind(run, training, save, advance)
