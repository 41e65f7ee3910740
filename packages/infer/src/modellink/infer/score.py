"""How likely a model holds given texts: log-probabilities of tokens that are there.

A pass is one line of tokens of many rows, without padding, over a cache of pages. What rows begin with in common (the solved
examples before all questions of a subject) is computed once and its pages are shared, also with rows that are asked for later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from modellink.infer.cache import SIZE, PagedCache, Piece, Row, moves
from modellink.infer.network import PASS_LOGITS, Network, Scoring
from modellink.kernels.errors import ModelLinkError

PASS_TOKENS = 2048  # of all rows of one pass
PASS_ROWS = 64
WORTH = 4  # pages that rows must have in common for one to wait until the other's are there

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, neither empty."""


@dataclass
class Likelihood:
    """What a continuation has: the log-probability of each token, and whether each is the model's first choice."""

    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True


@dataclass(eq=False)
class _Input:
    """Tokens to compute, and after which of them somebody wants to know what comes; `users` are the pairs that do."""

    row: Row
    first: int
    users: list[int]
    shared: bool
    admitted: bool = False

    @property
    def left(self) -> int:
        return len(self.row.tokens) - self.row.computed

    def admit(self, cache: PagedCache) -> None:
        """Take the pages that are there already, up to the first token after which something is wanted."""
        tokens, self.row.tokens = self.row.tokens, self.row.tokens[:self.first + 1]
        cache.tables.admit(self.row, shared=self.shared)
        self.row.tokens, self.admitted = tokens, True

    def common(self, other: _Input) -> int:
        """How many whole pages both begin with."""
        pages = range(min(len(self.row.tokens), len(other.row.tokens)) // SIZE)
        return sum(1 for _ in takewhile(lambda page: self.row.digest(page) == other.row.digest(page), pages))


@torch.inference_mode()
def likelihoods(network: Network, pairs: Sequence[Pair], done: Callable[[int], None] = lambda count: None) -> list[Likelihood]:
    """Each continuation's likelihood after its context, in the order of `pairs`.

    Pairs whose input is the same (one context, several continuations of one token) are computed once. `done` is told how many
    pairs were finished.
    """
    found = [Likelihood() for _ in pairs]
    waiting = deque(_inputs(network, pairs))
    if not waiting:
        return found
    cache = _cache(network, max(len(one.row.tokens) for one in waiting))
    try:
        while waiting:
            chosen = _choose(cache, waiting, PASS_LOGITS // network.spec.vocab_size)
            for (one, piece), logprobs in zip(chosen, _compute(network, cache, chosen), strict=True):
                low = max(one.first, piece.start)
                best = logprobs.argmax(-1)
                for number in one.users:
                    _note(found[number], pairs[number], low, logprobs, best)
                cache.tables.advance(one.row, piece.count, shared=one.shared)
                if not one.left:
                    cache.tables.release(one.row)
                    waiting.remove(one)
                    done(len(one.users))
    finally:
        for one in waiting:
            if one.admitted:
                cache.tables.release(one.row)
    return found


def _inputs(network: Network, pairs: Sequence[Pair]) -> list[_Input]:
    """What is to be computed, sorted so that rows with the same beginning are neighbours."""
    users: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        users.setdefault((*context, *continuation)[:-1], []).append(number)
    return [_Input(Row(list(tokens)), min(len(pairs[number][0]) for number in numbers) - 1, numbers,
                   shared=not moves(network.spec, len(tokens)))
            for tokens, numbers in sorted(users.items())]


def _cache(network: Network, longest: int) -> PagedCache:
    """A network's cache for scoring, which lives on; a larger one where a row does not fit."""
    if network.scoring is None or longest > network.scoring.longest:
        most = longest + PASS_TOKENS + PASS_ROWS * SIZE
        network.scoring = Scoring(longest, network.cache(rows=PASS_ROWS, piece=PASS_TOKENS, most=most))
    return network.scoring.cache


def _choose(cache: PagedCache, waiting: Sequence[_Input], room: int) -> list[tuple[_Input, Piece]]:
    """What the next pass computes, rows in their order, single tokens first.

    Args:
        room: how many tokens' logits there is memory for.
    """
    chosen: list[tuple[_Input, Piece]] = []
    budget, room = PASS_TOKENS, max(room, 1)
    for one in waiting:
        if not budget or not room or len(chosen) == PASS_ROWS:
            break
        if not one.admitted:
            before = chosen[-1][0] if chosen else None
            if before is not None and one.shared and one.common(before) - before.row.computed // SIZE >= WORTH:
                break  # in the next pass it finds them computed
            one.admit(cache)
        start = one.row.computed
        count = min(one.left, budget, max(one.first - start, 0) + room)
        if not cache.tables.grow(one.row, start + count):
            break
        chosen.append((one, Piece(one.row, start, count)))
        budget, room = budget - count, room - max(0, start + count - max(one.first, start))
    if not chosen:
        raise ModelLinkError(f"a text of {len(waiting[0].row.tokens)} tokens does not fit into a cache of {cache.tokens}",
                             fix="shorten the context, or free memory")
    return sorted(chosen, key=lambda item: item[1].count > 1)


def _compute(network: Network, cache: PagedCache, chosen: Sequence[tuple[_Input, Piece]]) -> list[Tensor]:
    """Log-probabilities [n, vocabulary] after the tokens of each piece that are wanted, which may be none."""
    wanted: list[int] = []
    counts, place = [], 0
    for one, piece in chosen:
        places = range(place + max(0, one.first - piece.start), place + piece.count)
        wanted += places
        counts.append(len(places))
        place += piece.count
    ids = [token for _, piece in chosen for token in piece.row.tokens[piece.start:piece.start + piece.count]]
    # a pass of which nothing is wanted fills the cache alone; one token's logits are asked for and not used
    state = cache.state([piece for _, piece in chosen], wanted or [place - 1])
    logits = network.logits(torch.tensor([ids]), state)[0][:len(wanted)].log_softmax(-1)
    return list(logits.split(counts))


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
