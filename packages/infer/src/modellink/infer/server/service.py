"""The thread between the server and the model: it takes requests in, runs one batch over all of them, and hands pieces out.

The first rank has the queue; the others follow it, told before every pass what joined and what left. Not here: HTTP.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modellink.infer.batch import Batch
from modellink.infer.engine import Engine
from modellink.infer.request import Answer, Request
from modellink.infer.server.metrics import Metrics
from modellink.kernels.errors import ModelLinkError

IDLE_SECONDS = 30.0  # after which the other ranks are told that nothing came, so that no collective waits too long


class Busy(ModelLinkError):
    """There are too many requests."""


class Failed(ModelLinkError):
    """Nothing can be answered any more."""


@dataclass
class Event:
    """What became certain of one answer of a submission."""

    index: int
    piece: str = ""
    done: bool = False
    failure: str | None = None  # why it came to its end without being an answer


@dataclass(eq=False)
class Submission:
    """Requests that came together."""

    answers: list[Answer]
    notify: Callable[[Event], None]
    every_piece: bool = True
    numbers: list[int] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Orders:
    """What the first rank tells the others before a pass."""

    join: list[tuple[int, Request]]
    leave: list[int]
    stop: bool


class Service:
    """Runs the batch of an engine in a thread. `start` on the first rank, `follow` on the others.

    Args:
        most_waiting: how many answers may be under way or wait at most.

    Attributes:
        failure: why the model can answer nothing any more.
        on_failure: called then, from the thread; the process is to end, for what started it can start it anew.
    """

    def __init__(self, engine: Engine, *, most_waiting: int) -> None:
        self.engine, self.most_waiting = engine, most_waiting
        self.batch: Batch = engine.batch()
        self.metrics = Metrics()
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._ended = False  # the thread takes nothing any more
        self._inbox: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._numbers = 0
        self._jobs: dict[int, tuple[Submission, int]] = {}  # by number, those under way
        self._answers: dict[int, Answer] = {}  # the same on every rank, which add them when they are told to
        self._thread = threading.Thread(target=self._run, name="modellink-batch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def follow(self) -> None:
        """The life of every rank but the first."""
        while self._pass(None):
            pass

    def stop(self) -> None:
        """End the thread, and the other ranks; answers under way fail."""
        self._inbox.put(("stop", 0))
        self._thread.join(timeout=60)

    @property
    def usable(self) -> bool:
        """Whether it answers what comes now."""
        return not self._ended

    @property
    def under_way(self) -> int:
        return len(self._jobs)

    def submit(self, requests: Sequence[Request], notify: Callable[[Event], None], *, every_piece: bool = True) -> Submission:
        """Let requests join; `notify` is called from the thread, with each piece or at the end of each answer.

        Raises:
            Busy: too many are under way.
            Failed: the model has failed, or the server stops.
            ModelLinkError: a request that the cache will never hold.
        """
        for request in requests:
            self.batch.check(request)
        submission = Submission([Answer.to(request, self.engine.tokenizer) for request in requests], notify, every_piece)
        with self._lock:
            if self._ended:  # what joined now nobody would answer
                raise Failed(f"the model has failed: {self.failure}" if self.failure else "the server stops",
                             fix="try again later")
            if len(self._jobs) + len(requests) > self.most_waiting:
                raise Busy(f"{len(self._jobs)} answers are under way or wait, {self.most_waiting} is the most",
                           fix="try again later")
            for index in range(len(requests)):
                self._numbers += 1
                submission.numbers.append(self._numbers)
                self._jobs[self._numbers] = (submission, index)
        for number in submission.numbers:
            self._inbox.put(("join", number))
        return submission

    def cancel(self, submission: Submission) -> None:
        """Nobody wants the rest of these answers."""
        for number in submission.numbers:
            if number in self._jobs:
                self._inbox.put(("leave", number))

    def _run(self) -> None:
        try:
            while self._pass(self._orders()):
                pass
        except BaseException as error:
            traceback.print_exc()
            self.failure = f"{type(error).__name__}: {error}"
        with self._lock:
            self._ended = True
        for number in list(self._jobs):
            self._tell(number, failure=self.failure or "the server stops")
        if self.failure is not None:
            self.on_failure()

    def _orders(self) -> _Orders:
        """What came in; waits where there is nothing else to do."""
        items: list[tuple[str, int]] = []
        try:
            if self.batch.idle:
                items.append(self._inbox.get(timeout=IDLE_SECONDS))
            while True:
                items.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        orders = _Orders([], [number for kind, number in items if kind == "leave"], ("stop", 0) in items)
        for kind, number in items:
            if kind == "join" and number in self._jobs:
                submission, index = self._jobs[number]
                orders.join.append((number, submission.answers[index].request))
        return orders

    def _pass(self, orders: _Orders | None) -> bool:
        """Do what the first rank orders, then a step; False at the end."""
        orders = self.engine.network.share(orders)
        assert orders is not None
        for number, request in orders.join:
            job = self._jobs.get(number)
            answer = job[0].answers[job[1]] if job else Answer.to(request, self.engine.tokenizer)
            try:
                self.batch.add(answer)
            except Exception as fault:  # of this answer, on every rank; the others are to go on
                self._failed(number, answer, fault)
            else:
                self._answers[number] = answer
        for number in orders.leave:
            if number in self._answers:
                self.batch.remove(self._answers.pop(number))
                self._jobs.pop(number, None)
                self.metrics.count("cancelled")
        if orders.stop:
            return False
        told = {id(answer): piece for answer, piece in self.batch.step()}
        for number, answer in list(self._answers.items()):
            if id(answer) in told:
                if answer.fault is not None:
                    self._failed(number, answer, answer.fault)
                else:
                    self._tell(number, told[id(answer)], done=answer.finish_reason is not None)
                if answer.finish_reason is not None:
                    del self._answers[number]
        return True

    def _failed(self, number: int, answer: Answer, fault: Exception) -> None:
        """Tell the one client whose answer met a fault of ours, and the log."""
        traceback.print_exception(fault)
        answer.fail(fault)
        self._tell(number, failure=f"the answer failed: {type(fault).__name__}: {fault}"[:500])

    def _tell(self, number: int, piece: str = "", *, done: bool = False, failure: str | None = None) -> None:
        if number not in self._jobs:  # on a rank that follows
            return
        submission, index = self._jobs[number]
        answer = submission.answers[index]
        if not failure and answer.token_ids:
            self.metrics.token(first=len(answer.token_ids) == 1, waited=time.monotonic() - submission.since)
        if done or failure:
            del self._jobs[number]
            self.metrics.finished(len(answer.request.prompt), time.monotonic() - submission.since, failed=failure is not None)
        if submission.every_piece or done or failure:
            submission.notify(Event(index, piece, done, failure))
