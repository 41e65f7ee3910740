# SPDX-License-Identifier: Apache-2.0
"""The thread between the server and the model: takes requests, runs one batch over all of them, and returns
pieces of text.

The first rank has the queue; before each pass it tells the other ranks which requests join and leave. Not
here: HTTP.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modellink.infer.batch import ContinuousBatch
from modellink.infer.engine import Engine
from modellink.infer.request import Completion, GenerationRequest
from modellink.infer.server.metrics import Metrics
from modellink.kernels.errors import ModelLinkError

# interval of messages to the other ranks while there are no requests, so that no collective times out
IDLE_SECONDS = 30.0


class Busy(ModelLinkError):
    """Too many completions are running or waiting."""


class Stopped(ModelLinkError):
    """The service does not accept requests any more."""


@dataclass
class Event:
    """Progress of one completion of a submission.

    Attributes:
        index: of the completion.
        failure: why it ended without a result.
    """

    index: int
    piece: str = ""
    done: bool = False
    failure: str | None = None


@dataclass(eq=False)
class Submission:
    """The completions of one HTTP request.

    Attributes:
        every_piece: call `notify` for every piece of text, else only at the end of each completion.
        numbers: of its jobs.
        since: time of submission in seconds (monotonic clock).
    """

    completions: list[Completion]
    notify: Callable[[Event], None]
    every_piece: bool = True
    numbers: list[int] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Orders:
    """What the first rank tells the others before a pass."""

    join: list[tuple[int, GenerationRequest]]
    leave: list[int]
    stop: bool


class Service:
    """Runs the batch of an engine in a thread. Call `start` on the first rank, `follow` on the others.

    Args:
        max_waiting: the most completions that may run or wait.

    Attributes:
        failure: the error of the model; the service then accepts no requests.
        on_failure: called from the thread when the model fails; the process should then exit, so that it can
            be restarted.
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.batch: ContinuousBatch = engine.batch()
        self.metrics = Metrics()
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._ended = False  # the thread accepts nothing any more
        self._inbox: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._last_number = 0
        # unfinished completions by number, on the first rank
        self._jobs: dict[int, tuple[Submission, int]] = {}
        self._completions: dict[int, Completion] = {}  # those in the batch, on every rank
        self._thread = threading.Thread(target=self._run, name="modellink-batch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def follow(self) -> None:
        """Run passes as the first rank orders, until it stops."""
        while self._pass(None):
            pass

    def stop(self) -> None:
        """Stop the thread and the other ranks; unfinished completions fail."""
        self._inbox.put(("stop", 0))
        self._thread.join(timeout=60)

    @property
    def usable(self) -> bool:
        """Whether new requests are accepted."""
        return not self._ended

    @property
    def unfinished(self) -> int:
        """Number of completions that are running or waiting."""
        return len(self._jobs)

    def submit(self, requests: Sequence[GenerationRequest], notify: Callable[[Event], None], *,
               every_piece: bool = True) -> Submission:
        """Let requests join the batch. `notify` is called from the thread.

        Raises:
            Busy: too many completions are running or waiting.
            Stopped: the model has failed, or the server is stopping.
            ExceedsCache: the cache can never hold one of the requests.
        """
        for request in requests:
            self.batch.check(request)
        completions = [Completion.start(request, self.engine.tokenizer) for request in requests]
        submission = Submission(completions, notify, every_piece)
        with self._lock:
            if self._ended:  # a request that joined now would never finish
                raise Stopped(f"the model has failed: {self.failure}" if self.failure
                              else "the server is stopping", fix="try again later")
            if len(self._jobs) + len(requests) > self.max_waiting:
                raise Busy(f"{len(self._jobs)} completions are running or waiting, the limit is "
                           f"{self.max_waiting}",
                           fix="try again later")
            for index in range(len(requests)):
                self._last_number += 1
                submission.numbers.append(self._last_number)
                self._jobs[self._last_number] = (submission, index)
        for number in submission.numbers:
            self._inbox.put(("join", number))
        return submission

    def cancel(self, submission: Submission) -> None:
        """Cancel the unfinished completions of a submission."""
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
            self._notify(number, failure=self.failure or "the server is stopping")
        if self.failure is not None:
            self.on_failure()

    def _orders(self) -> _Orders:
        """Collect what came in; waits if the batch is idle."""
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
                orders.join.append((number, submission.completions[index].request))
        return orders

    def _pass(self, orders: _Orders | None) -> bool:
        """Follow the first rank's orders, then run a step. Return False at the end."""
        orders = self.engine.network.broadcast(orders)
        assert orders is not None
        for number, request in orders.join:
            self._join(number, request)
        for number in orders.leave:
            if number in self._completions:
                self.batch.remove(self._completions.pop(number))
                self._jobs.pop(number, None)
                self.metrics.count("cancelled")
        if orders.stop:
            return False
        pieces = {id(completion): piece for completion, piece in self.batch.step()}
        for number, completion in list(self._completions.items()):
            if id(completion) not in pieces:
                continue
            if completion.error is not None:
                self._fail(number, completion, completion.error)
            else:
                self._notify(number, pieces[id(completion)], done=completion.finish_reason is not None)
            if completion.finish_reason is not None:
                del self._completions[number]
        return True

    def _join(self, number: int, request: GenerationRequest) -> None:
        """Add a request to the batch, on every rank; only the first rank has its submission."""
        job = self._jobs.get(number)
        completion = job[0].completions[job[1]] if job else Completion.start(request, self.engine.tokenizer)
        try:
            self.batch.add(completion)
        except Exception as error:  # concerns this completion only, on every rank; the others continue
            self._fail(number, completion, error)
        else:
            self._completions[number] = completion

    def _fail(self, number: int, completion: Completion, error: Exception) -> None:
        """Log an error that concerns one completion, and report it to its client."""
        traceback.print_exception(error)
        completion.fail(error)
        self._notify(number, failure=f"the completion failed: {type(error).__name__}: {error}"[:500])

    def _notify(self, number: int, piece: str = "", *, done: bool = False,
                failure: str | None = None) -> None:
        if number not in self._jobs:  # on the ranks that follow
            return
        submission, index = self._jobs[number]
        completion = submission.completions[index]
        elapsed = time.monotonic() - submission.since
        if not failure and completion.token_ids:
            self.metrics.token(first=len(completion.token_ids) == 1, waited=elapsed)
        if done or failure:
            del self._jobs[number]
            self.metrics.finished(len(completion.request.prompt), elapsed, failed=failure is not None)
        if submission.every_piece or done or failure:
            submission.notify(Event(index, piece, done, failure))
