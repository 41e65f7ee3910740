# SPDX-License-Identifier: Apache-2.0
"""Tokenize pieces on a Ray cluster (extra `ray`) whose nodes share a disk. The parts equal those of a local run, byte for byte.

Ray chooses the cluster: RAY_ADDRESS, the cluster this machine belongs to, or a new one on this machine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modellink.data_prep.handlers import Handler
from modellink.data_prep.inputs import Piece
from modellink.data_prep.pieces import Done, Job, WorkerDied, tokenize_piece
from modellink.kernels.errors import ModelLinkError

AHEAD = 4  # pieces in flight per processor
RETRIES = 3  # retries of a piece whose node or process died; a bad row is not retried


def tokenize_on_ray(job: Job, pieces: list[Piece], workers: int, handler: Handler) -> Iterator[Done]:
    """Tokenize pieces on all nodes, whatever `workers` is, and yield results as they finish. Each task makes its own handler.

    When a piece fails, the pieces already submitted are finished first; then the error of the earliest one is raised.

    Raises:
        ModelLinkError: Ray is not installed, or a piece fails.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ModelLinkError("Ray is not installed", where="--executor",
                             fix="install modellink-data-prep[ray], or use --workers and --piece") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        remote: Any = ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD")(_tokenize_there)
        todo, waiting, failed = list(reversed(pieces)), dict[Any, int](), dict[int, Exception]()
        ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while todo or waiting:
            while todo and not failed and len(waiting) < ahead:
                piece = todo.pop()
                waiting[remote.remote(str(Path.cwd()), job, piece)] = piece.index
            if not waiting:
                break
            ready, _ = ray.wait(list(waiting), num_returns=1)
            index = waiting.pop(ready[0])
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                failed[index] = error.cause if isinstance(error.cause, ModelLinkError) else error
            except ray.exceptions.RayError as error:
                failed[index] = WorkerDied(f"a node or process died near piece {index}: {str(error).splitlines()[0]}",
                                           where="--executor", fix="finished pieces are kept: run the command again")
        if failed:
            raise failed[min(failed)]
    finally:
        if started:
            ray.shutdown()


def _tokenize_there(folder: str, job: Job, piece: Piece) -> Done:
    """On a node: resolve relative paths against the folder in which the command was given."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of gigatoken; a task is one processor
    if not Path(folder).is_dir():
        raise ModelLinkError("the folder is missing on this node", where=folder, fix="all nodes must share a disk")
    os.chdir(folder)
    return tokenize_piece(job, piece)
