"""How likely a model holds given texts: log-probabilities of tokens that are there, in batches with padding at the right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink.core.model.state import SequenceState
from modellink.infer.cache import SIZE, PagedCache, Piece, Row
from modellink.infer.network import Network

PASS_TOKENS = 2048  # of all rows of one pass, padding included
PASS_LOGITS = 1 << 26  # numbers in the logits of one pass, 256 MB in fp32

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, neither empty."""


@dataclass
class Likelihood:
    """What a continuation has: the log-probability of each token, and whether each is the model's first choice."""

    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True


@torch.inference_mode()
def likelihoods(network: Network, pairs: Sequence[Pair], done: Callable[[int], None] = lambda count: None) -> list[Likelihood]:
    """Each continuation's likelihood after its context, in the order of `pairs`.

    Pairs whose input is the same (one context, several continuations of one token) are computed once. `done` is told how many
    pairs were finished.
    """
    found = [Likelihood() for _ in pairs]
    users: dict[tuple[int, ...], list[int]] = {}  # the pairs that need an input
    for number, (context, continuation) in enumerate(pairs):
        users.setdefault((*context, *continuation)[:-1], []).append(number)
    needed = [(row, min(len(pairs[number][0]) for number in numbers) - 1) for row, numbers in users.items()]
    for rows, first in _batches(needed, PASS_LOGITS // network.spec.vocab_size):
        for low, logprobs in _passes(network, rows, first):
            best = logprobs.argmax(-1)
            for place, row in enumerate(rows):
                for number in users[row]:
                    _note(found[number], pairs[number], low, logprobs[place], best[place])
        done(sum(len(users[row]) for row in rows))
    return found


def _note(likelihood: Likelihood, pair: Pair, low: int, logprobs: Tensor, best: Tensor) -> None:
    """Take from the log-probabilities [n, vocabulary] after the tokens `low` .. `low` + n - 1 of a row those of a pair."""
    context, continuation = pair
    offset = len(context) - 1  # the token after which the continuation begins
    start, stop = max(offset, low), min(offset + len(continuation), low + len(logprobs))
    if start >= stop:
        return
    targets = torch.tensor(continuation[start - offset:stop - offset], device=logprobs.device)
    rows = slice(start - low, stop - low)
    likelihood.logprobs += logprobs[rows].gather(-1, targets[:, None])[:, 0].tolist()
    likelihood.greedy &= bool((best[rows] == targets).all())


def _batches(needed: Sequence[tuple[tuple[int, ...], int]], room: int) -> Iterator[tuple[list[tuple[int, ...]], int]]:
    """Rows of similar length, and the first token after which any of them wants something.

    Args:
        needed: rows, each with the first token after which it wants something.
        room: how many tokens' logits there is memory for.
    """
    rows: list[tuple[int, ...]] = []
    first = 0
    for row, start in sorted(needed, key=lambda item: len(item[0]), reverse=True):
        longest = len(rows[0]) if rows else 0
        earlier = min(first, start)
        if rows and ((len(rows) + 1) * longest > PASS_TOKENS or (len(rows) + 1) * (longest - earlier) > room):
            yield rows, first
            rows = []
        rows, first = [*rows, row], earlier if rows else start
    if rows:
        yield rows, first


def _passes(network: Network, rows: Sequence[tuple[int, ...]], first: int) -> Iterator[tuple[int, Tensor]]:
    """(low, log-probabilities [batch, n, vocabulary] after the tokens low .. low + n - 1), from `first` to the longest row's end.

    One pass where its logits fit into memory, else several over a cache.
    """
    longest = max(map(len, rows))
    step = max(1, PASS_LOGITS // network.spec.vocab_size // len(rows))
    if longest - first <= step and not (network.step and network.step.int8):  # int8 weights are used over a cache alone
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        wanted = torch.arange(first, longest, device=network.device).expand(len(rows), -1)
        yield first, network.logits(padded, SequenceState(length=longest, wanted=wanted)).log_softmax(-1)
        return
    cache = network.cache(rows=len(rows), piece=longest, tokens=len(rows) * (longest + SIZE))
    held = [Row([*row, *[0] * (longest - len(row))]) for row in rows]
    for row in held:
        cache.tables.admit(row, shared=False)
    begin = 0
    for low in range(first, longest, step):
        high = min(low + step, longest)
        yield low, _piece(network, cache, held, begin, low, high).log_softmax(-1)
        begin = high


def _piece(network: Network, cache: PagedCache, rows: Sequence[Row], begin: int, low: int, high: int) -> Tensor:
    """Logits [rows, high - low, vocabulary] after tokens low .. high - 1, where those before `begin` are in the cache."""
    count = high - begin
    for row in rows:
        cache.tables.grow(row, high)
    wanted = [number * count + place for number in range(len(rows)) for place in range(low - begin, count)]
    state = cache.state([Piece(row, begin, count) for row in rows], wanted)
    logits = network.logits(torch.tensor([[token for row in rows for token in row.tokens[begin:high]]]), state)
    for row in rows:
        cache.tables.advance(row, count, shared=False)
    return logits.view(len(rows), high - low, -1)
