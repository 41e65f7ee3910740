# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint with threads, in the foreground or in the background of training.

megatron-core plans which rank writes which tensors and collects the results. Its own writers are forked processes,
and it waits forever for one that dies; threads are part of their rank's process: their errors end the run, and a kill
leaves `iter_N.tmp`, which readers ignore.
"""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from modellink.core.engine import current_device
from modellink.core.train.finite import valid_checkpoint
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import kill_point


@dataclass
class _Pending:
    request: AsyncRequest
    writes: Sequence[Future[Any]]
    finish: Callable[[], None]
    where: Path


class Writer:
    """Holds at most one unfinished save. All ranks call the same methods after the same iterations."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def start(self, request: AsyncRequest, finish: Callable[[], None], where: Path, *, copy: bool) -> None:
        """Start writing; `finish` is called on every rank when all ranks are done.

        Args:
            request: megatron-core's plan of the save.
            where: the folder being written, for messages.
            copy: training continues meanwhile, so copy tensors in host memory first. Those of a device are always copied.
        """
        self.wait()
        buckets = _staged(request, copy=copy)
        pool = ThreadPoolExecutor(max(1, len(buckets)), thread_name_prefix="checkpoint")
        transforms = request.async_fn.args[0] if request.async_fn is not None else []
        writes = [pool.submit(_write, transforms, number, bucket) for number, bucket in enumerate(buckets)]
        pool.shutdown(wait=False)
        self._pending = _Pending(request, writes, finish, where)

    def poll(self) -> None:
        """Complete the save if all ranks have written it."""
        self._advance(block=False)

    def wait(self) -> None:
        """Wait for the unfinished save, if any.

        Raises:
            ModelLinkError: on every rank if a rank could not write; earlier checkpoints are intact.
        """
        self._advance(block=True)

    def _advance(self, *, block: bool) -> None:
        if self._pending is None:
            return
        pending = self._pending
        if block:
            wait(pending.writes)
        errors = [error for write in pending.writes if write.done() and (error := write.exception()) is not None]
        states = torch.tensor([not all(write.done() for write in pending.writes), bool(errors)], dtype=torch.int32,
                              device=current_device())
        dist.all_reduce(states, op=dist.ReduceOp.MAX)
        writing, failed = states.tolist()
        if failed:
            self._pending = None
            wait(pending.writes)
            _raise(errors, pending.where)
        if writing:
            return
        self._pending = None
        if pending.writes:  # the results that megatron-core's finalize functions expect of its own writers
            results = pending.request.async_fn_args[2]
            results.put({number: write.result() for number, write in enumerate(pending.writes)})
        for function in pending.request.finalize_fns:
            function()
        pending.finish()


def _staged(request: AsyncRequest, *, copy: bool) -> list[Any]:
    """The files of this rank as (path, name, (bytes, tensors)), with tensors in host memory."""
    if request.async_fn is None:
        return []
    staged = []
    for (path, name, (data, before)), (_, _, (_, after)) in zip(request.async_fn_args[1], request.preload_fn(), strict=True):
        tensors = [(item, tensor.clone() if copy and tensor.data_ptr() == given.data_ptr() else tensor)
                   for (_, given), (item, tensor) in zip(before, after, strict=True)]
        staged.append((path, name, (data, tensors)))
    return staged


def _write(transforms: list[Any], number: int, bucket: Any) -> Any:
    """Write one file; returns megatron-core's list of its contents."""
    kill_point("while-writing")
    results: queue.Queue[tuple[int, Any]] = queue.Queue()
    counted: queue.Queue[int] = queue.Queue()
    counted.put(number)
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, counted, True)
    outcome = results.get()[1]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def on_all_ranks(work: Callable[[], None], where: Path) -> None:
    """Run `work`, which uses no collectives, on every rank; an OSError of one rank is raised on all."""
    errors: list[BaseException] = []
    try:
        work()
    except OSError as error:
        errors.append(error)
    failed = torch.tensor(bool(errors), dtype=torch.int32, device=current_device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed.item():
        _raise(errors, where)


def _raise(errors: Sequence[BaseException], where: Path) -> None:
    reasons: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    mine = [f"rank {dist.get_rank()}: {type(error).__name__}: {error}" for error in map(_origin, errors)]
    dist.all_gather_object(reasons, mine)
    if dist.get_rank() == 0:
        shutil.rmtree(where, ignore_errors=True)  # frees the disk space that may be missing
    raise ModelLinkError("the checkpoint could not be written: " + "; ".join(line for lines in reasons for line in lines),
                         where=where,
                         fix=f"free disk space or choose another --save; {valid_checkpoint(where.parent)}")


def _origin(error: BaseException) -> BaseException:
    """The error of the operating system, which torch.save wraps in one of its own."""
    while not isinstance(error, OSError) and (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
