# SPDX-License-Identifier: Apache-2.0
"""Measures whether the compiled step is faster than core's model on this machine, when a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from modellink.infer.cache import PagedCache
from modellink.infer.pages import PAGE_SIZE, CachedSequence, Chunk
from modellink.infer.passes import Pass

PASSES = 3  # the first one warms up
CACHE_TOKENS = 2 * PAGE_SIZE  # what the cache for the measurement must hold


def is_faster(compiled: Callable[[Pass], Tensor], model: Callable[[Pass], Tensor],
              cache: PagedCache) -> tuple[bool, str]:
    """Return whether the compiled step decodes faster than the model, and the two times as text."""
    compiled_seconds, model_seconds = (seconds_per_token(run, cache) for run in (compiled, model))
    text = f"{1e3 * compiled_seconds:.1f} ms per token compiled, {1e3 * model_seconds:.1f} ms with the model"
    return compiled_seconds < model_seconds, text


@torch.inference_mode()
def seconds_per_token(run: Callable[[Pass], Tensor], cache: PagedCache) -> float:
    """Return the shortest time of a few decode passes, in seconds."""
    sequence = CachedSequence([0] * PASSES)
    cache.tables.admit(sequence, shared=False)
    cache.tables.grow(sequence, PASSES)
    seconds = []
    for position in range(PASSES):
        work = Pass(cache, [Chunk(sequence, position, 1)], [0])
        start = time.perf_counter()
        run(work)
        seconds.append(time.perf_counter() - start)
        cache.tables.advance(sequence, 1, shared=False)
    cache.tables.release(sequence)
    return min(seconds)
