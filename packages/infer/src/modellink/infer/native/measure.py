"""Whether the compiled step pays on this machine: a few tokens are computed both ways when a model is loaded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from modellink.infer.cache import SIZE, Piece, Row

if TYPE_CHECKING:
    from modellink.infer.network import Network

PASSES = 3  # the first of which is warmer for neither


def pays(network: Network) -> tuple[bool, str]:
    """Whether the step of a network is faster than its model at single tokens, and that in words."""
    step = network.step
    assert step is not None
    compiled = seconds_a_token(network)
    network.step = None
    model = seconds_a_token(network)
    network.step = step
    return compiled < model, f"{1e3 * compiled:.1f} ms a token compiled, {1e3 * model:.1f} ms as it is"


@torch.inference_mode()
def seconds_a_token(network: Network) -> float:
    """The best of some passes of one token."""
    cache = network.cache(rows=1, piece=SIZE, tokens=2 * SIZE)
    row = Row([0] * PASSES)
    cache.tables.admit(row, shared=False)
    cache.tables.grow(row, PASSES)
    found = []
    for position in range(PASSES):
        state = cache.state([Piece(row, position, 1)], [0])
        start = time.perf_counter()
        network.logits(torch.tensor([[0]]), state)
        found.append(time.perf_counter() - start)
        cache.tables.advance(row, 1, shared=False)
    return min(found)
