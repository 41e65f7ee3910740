# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of given texts: log-probabilities of tokens that are already there.

A pass is one line of tokens of many sequences, without padding, over a paged cache. A common prefix (the
solved examples before all questions of a subject) is computed once and its pages are shared, also with
sequences of later calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from modellink.infer.cache import PagedCache, rotary_depends_on_length
from modellink.infer.network import MAX_PASS_LOGITS, Network
from modellink.infer.pages import PAGE_SIZE, CachedSequence, Chunk
from modellink.infer.passes import Pass
from modellink.kernels.errors import ModelLinkError

MAX_PASS_TOKENS = 2048
MAX_PASS_SEQUENCES = 64
MIN_SHARED_PAGES = 4  # a sequence waits for another's pages if at least so many are common to both

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, neither empty."""


@dataclass
class ContinuationLikelihood:
    """The log-probability of each token of a continuation, and whether each is the most likely one."""

    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True


@dataclass(eq=False)
class _Input:
    """A sequence to compute.

    Attributes:
        first: position of the first token after which log-probabilities are wanted.
        users: numbers of the pairs that want them.
        shared: its pages can be shared with other sequences.
        admitted: it has a page table.
    """

    sequence: CachedSequence
    first: int
    users: list[int]
    shared: bool
    admitted: bool = False

    @property
    def remaining(self) -> int:
        return len(self.sequence.tokens) - self.sequence.computed

    def admit(self, cache: PagedCache) -> None:
        """Use cached pages up to the first token after which something is wanted."""
        sequence = self.sequence
        tokens, sequence.tokens = sequence.tokens, sequence.tokens[:self.first + 1]
        cache.tables.admit(sequence, shared=self.shared)
        sequence.tokens, self.admitted = tokens, True

    def common_pages(self, other: _Input) -> int:
        """Return the number of full pages that both sequences begin with."""
        pages = range(min(len(self.sequence.tokens), len(other.sequence.tokens)) // PAGE_SIZE)

        def is_common(page: int) -> bool:
            return self.sequence.digest(page) == other.sequence.digest(page)
        return sum(1 for _ in takewhile(is_common, pages))


class Scorer:
    """Computes likelihoods, and keeps its cache between calls."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._cache: PagedCache | None = None
        self._longest = 0  # the longest sequence the cache was allocated for, in tokens

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[Pair], on_finished: Callable[[int], None] = lambda count: None,
                    ) -> list[ContinuationLikelihood]:
        """Return the likelihood of each continuation after its context.

        Pairs with the same input (one context, several continuations of one token) are computed once.

        Args:
            on_finished: called with the number of pairs that were finished.
        """
        found = [ContinuationLikelihood() for _ in pairs]
        waiting = deque(_inputs(self._network, pairs))
        if not waiting:
            return found
        cache = self._cache_for(max(len(item.sequence.tokens) for item in waiting))
        try:
            while waiting:
                chosen = _choose(cache, waiting, MAX_PASS_LOGITS // self._network.spec.vocab_size)
                for (item, chunk), logprobs in zip(chosen, _run(self._network, cache, chosen), strict=True):
                    low = max(item.first, chunk.start)
                    best = logprobs.argmax(-1)
                    for number in item.users:
                        _add_logprobs(found[number], pairs[number], low, logprobs, best)
                    cache.tables.advance(item.sequence, chunk.count, shared=item.shared)
                    if not item.remaining:
                        cache.tables.release(item.sequence)
                        waiting.remove(item)
                        on_finished(len(item.users))
        finally:
            for item in waiting:
                if item.admitted:
                    cache.tables.release(item.sequence)
        return found

    def _cache_for(self, longest: int) -> PagedCache:
        """Return the cache of earlier calls, or a larger one if a sequence does not fit."""
        if self._cache is None or longest > self._longest:
            most = longest + MAX_PASS_TOKENS + MAX_PASS_SEQUENCES * PAGE_SIZE
            self._cache = None  # free its memory first
            self._cache = self._network.make_cache(max_sequences=MAX_PASS_SEQUENCES,
                                                   max_chunk=MAX_PASS_TOKENS, most=most)
            self._longest = longest
        return self._cache


def _inputs(network: Network, pairs: Sequence[Pair]) -> list[_Input]:
    """Return the sequences to compute, sorted so that those with a common prefix are neighbors."""
    users: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        users.setdefault((*context, *continuation)[:-1], []).append(number)
    return [_Input(CachedSequence(list(tokens)), min(len(pairs[number][0]) for number in numbers) - 1,
                   numbers, shared=not rotary_depends_on_length(network.spec, len(tokens)))
            for tokens, numbers in sorted(users.items())]


def _choose(cache: PagedCache, waiting: Sequence[_Input], logits_budget: int) -> list[tuple[_Input, Chunk]]:
    """Return what the next pass computes, in the order of the sequences, single tokens first.

    Args:
        logits_budget: number of tokens whose logits fit into memory.
    """
    chosen: list[tuple[_Input, Chunk]] = []
    budget, logits_budget = MAX_PASS_TOKENS, max(logits_budget, 1)
    for item in waiting:
        if not budget or not logits_budget or len(chosen) == MAX_PASS_SEQUENCES:
            break
        if not item.admitted:
            previous = chosen[-1][0] if chosen else None
            if previous is not None and item.shared:
                computed = previous.sequence.computed // PAGE_SIZE
                if item.common_pages(previous) - computed >= MIN_SHARED_PAGES:
                    break  # the next pass can share them
            item.admit(cache)
        start = item.sequence.computed
        count = min(item.remaining, budget, max(item.first - start, 0) + logits_budget)
        if not cache.tables.grow(item.sequence, start + count):
            break
        chosen.append((item, Chunk(item.sequence, start, count)))
        budget -= count
        logits_budget -= max(0, start + count - max(item.first, start))
    if not chosen:
        raise ModelLinkError(f"a text of {len(waiting[0].sequence.tokens)} tokens does not fit into a cache "
                             f"of {cache.max_sequence_tokens}", fix="shorten the context, or free memory")
    return sorted(chosen, key=lambda pair: pair[1].count > 1)


def _run(network: Network, cache: PagedCache, chosen: Sequence[tuple[_Input, Chunk]]) -> list[Tensor]:
    """Run a pass. Return, for each chunk, the log-probabilities [n, vocabulary] after its wanted tokens; n
    may be 0."""
    wanted: list[int] = []
    counts, begin = [], 0
    for item, chunk in chosen:
        indices = range(begin + max(0, item.first - chunk.start), begin + chunk.count)
        wanted += indices
        counts.append(len(indices))
        begin += chunk.count
    # if nothing is wanted, the pass only fills the cache: compute one token's logits and drop them
    work = Pass(cache, [chunk for _, chunk in chosen], wanted or [begin - 1])
    logits = network.logits(work)[:len(wanted)].log_softmax(-1)
    return list(logits.split(counts))


def _add_logprobs(likelihood: ContinuationLikelihood, pair: Pair, low: int, logprobs: Tensor,
                  best: Tensor) -> None:
    """Add a pair's log-probabilities from those [n, vocabulary] after the positions `low` to `low` + n - 1 of
    its input.

    Args:
        best: the most likely tokens, [n].
    """
    context, continuation = pair
    offset = len(context) - 1  # the position after which the continuation begins
    start, stop = max(offset, low), min(offset + len(continuation), low + len(logprobs))
    if start >= stop:
        return
    targets = torch.tensor(continuation[start - offset:stop - offset], device=logprobs.device)
    rows = slice(start - low, stop - low)
    likelihood.logprobs += logprobs[rows].gather(-1, targets[:, None])[:, 0].tolist()
    likelihood.greedy &= bool((best[rows] == targets).all())
