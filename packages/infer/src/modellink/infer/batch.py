# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests join and leave a running batch, one pass at a time.

A pass computes the newest token of every running sequence, and prefill chunks with the rest of its token
budget. If the cache is full, the newest sequence is preempted: it returns to the queue and is recomputed
later. All ranks run the same steps; the first rank's choice of tokens and its cancellations apply to all. Not
here: beam search.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.data_prep import Tokenizer
from modellink.infer.cache import PagedCache, rotary_depends_on_length
from modellink.infer.constraint import Constraint
from modellink.infer.network import MAX_PASS_LOGITS, Network
from modellink.infer.pages import PAGE_SIZE, CachedSequence, Chunk
from modellink.infer.passes import Pass
from modellink.infer.request import Completion, GenerationRequest, SequenceTooLong, TokenLogprobs
from modellink.infer.sampler import Sampler
from modellink.kernels.errors import ModelLinkError

NO_TOKEN = -1  # in place of a token that could not be chosen


class ExceedsCache(SequenceTooLong):
    """The cache can never hold the sequence."""


@dataclass(eq=False)
class BatchEntry:
    """A completion in the batch.

    Attributes:
        started: a chunk of it was computed since it joined.
    """

    completion: Completion
    sequence: CachedSequence
    sampler: Sampler
    started: bool = False

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next one can be chosen."""
        return len(self.sequence.tokens) - self.sequence.computed


@dataclass(frozen=True)
class ScheduledChunk:
    """The chunk of an entry that a pass computes. Read its properties before the pass: they depend on the
    entry's progress.

    Attributes:
        begin: index of its first token in the pass.
    """

    entry: BatchEntry
    chunk: Chunk
    begin: int

    @property
    def last(self) -> int:
        """Index of its last token in the pass."""
        return self.begin + self.chunk.count - 1

    @property
    def is_complete(self) -> bool:
        """Whether all tokens of the sequence are computed after this chunk."""
        return self.chunk.count == self.entry.remaining

    @property
    def yields_token(self) -> bool:
        """Whether a token is chosen after this chunk; not if only the prompt is evaluated."""
        return self.is_complete and self.entry.completion.request.max_new_tokens > 0

    @property
    def prompt_positions(self) -> range:
        """Positions of the sequence after which a prompt log-probability is requested and not known yet."""
        completion, chunk = self.entry.completion, self.chunk
        if not completion.missing_prompt_logprobs:
            return range(0)
        known, last = len(completion.prompt_logprobs), len(completion.request.prompt) - 1
        return range(max(chunk.start, known), min(chunk.end, last))

    @property
    def prompt_indices(self) -> list[int]:
        """Indices of `prompt_positions` in the pass."""
        return [self.begin + position - self.chunk.start for position in self.prompt_positions]


class ContinuousBatch:
    """Completions that are computed together.

    Args:
        max_sequences: the most completions that run at a time.
        token_budget: the most tokens of a pass with prefill chunks; the decode steps of all sequences always
            fit.
        tokenizer: needed for requests with a grammar.

    Attributes:
        waiting, running: entries in the order in which they joined.
    """

    def __init__(self, network: Network, cache: PagedCache, *, max_sequences: int, token_budget: int,
                 tokenizer: Tokenizer | None = None) -> None:
        self.network, self.cache, self.tokenizer = network, cache, tokenizer
        self.max_sequences, self.token_budget = max_sequences, max(token_budget, max_sequences)
        self.waiting: deque[BatchEntry] = deque()
        self.running: list[BatchEntry] = []
        # prompt tokens with logits in one pass
        self._max_prompt_logits = max(1, MAX_PASS_LOGITS // network.spec.vocab_size)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, completion: Completion) -> None:
        """Let a completion join at the next step.

        Raises:
            ExceedsCache: the cache can never hold it.
        """
        self.check(completion.request)
        sequence = CachedSequence([*completion.request.prompt, *completion.token_ids])
        sampler = Sampler(completion.request.sampling, self.network.device, completion.request.prompt,
                          completion.token_ids, self._constraint(completion))
        self.waiting.append(BatchEntry(completion, sequence, sampler))

    def _constraint(self, completion: Completion) -> Constraint | None:
        if completion.request.grammar is None:
            return None
        assert self.tokenizer is not None
        constraint = Constraint(self.tokenizer, completion.request.grammar, completion.request.stop_ids)
        for token in completion.token_ids:
            constraint.accept(token)
        return constraint

    def check(self, request: GenerationRequest) -> None:
        """Raise ExceedsCache if the cache can never hold a request."""
        need = len(request.prompt) + request.max_new_tokens
        capacity = self.cache.max_sequence_tokens
        if need > capacity:
            raise ExceedsCache(f"a sequence of {need} tokens does not fit into a cache of {capacity}",
                               where="--cache-tokens",
                               fix="use a larger cache, a shorter prompt or fewer new tokens")

    def remove(self, completion: Completion) -> None:
        """Take a completion out, finished or not."""
        self.waiting = deque(entry for entry in self.waiting if entry.completion is not completion)
        for entry in [entry for entry in self.running if entry.completion is completion]:
            self._retire(entry)

    @torch.inference_mode()
    def step(self) -> list[tuple[Completion, str]]:
        """Run one pass. Return the completions that got a token or finished, each with its new piece of text
        (may be empty)."""
        cancelled = self._drop_cancelled()
        self._admit()
        scheduled = self._schedule()
        if not scheduled:
            if self.waiting and not self.running and not cancelled:
                raise ModelLinkError("other batches occupy the cache", where="--cache-tokens",
                                     fix="finish the other streams first, or use a larger cache")
            return cancelled
        choosing = [item for item in scheduled if item.yields_token]
        finished = [item.entry for item in scheduled if item.is_complete and not item.yields_token]
        prompts = [(item.entry.completion, item.prompt_positions) for item in scheduled]
        prompt_indices = [index for item in scheduled for index in item.prompt_indices]
        logits = self._run([item.chunk for item in scheduled],
                           prompt_indices + [item.last for item in choosing])
        if prompt_indices:
            _add_prompt_logprobs(prompts, logits[:len(prompt_indices)])
        for entry in finished:
            self._retire(entry)
        updates = cancelled + [(entry.completion, entry.completion.end("length")) for entry in finished]
        if choosing:
            updates += self._push([item.entry for item in choosing], logits[len(prompt_indices):])
        return updates

    def _run(self, chunks: Sequence[Chunk], wanted: Sequence[int]) -> Tensor:
        """Run a pass over chunks and return its logits [wanted, vocabulary]."""
        logits = self.network.logits(Pass(self.cache, chunks, wanted))
        for chunk in chunks:
            self.cache.tables.advance(chunk.sequence, chunk.count, shared=self._is_cacheable(chunk.sequence))
        return logits

    def _is_cacheable(self, sequence: CachedSequence) -> bool:
        """Whether the cached keys of a sequence stay valid for later passes and other sequences."""
        return not rotary_depends_on_length(self.network.spec, len(sequence.tokens))

    def _drop_cancelled(self) -> list[tuple[Completion, str]]:
        """Finish the completions that the first rank has cancelled, including those whose prompt is still
        computed."""
        entries = [*self.running, *self.waiting]
        if not entries:
            return []
        flags = self.network.broadcast_ints([int(entry.completion.cancelled) for entry in entries])
        dropped = [entry.completion for entry, flag in zip(entries, flags, strict=True) if flag]
        for completion in dropped:
            self.remove(completion)
        return [(completion, completion.end("cancelled")) for completion in dropped]

    def _admit(self) -> None:
        """Move waiting entries to the running ones, first come first served, while the cache has pages for
        their prompts."""
        while self.waiting and len(self.running) < self.max_sequences:
            entry = self.waiting[0]
            length = len(entry.sequence.tokens) + 1
            if self.running and any(self.cache.max_pages(pool, length) > pool.available
                                    for pool in self.cache.pools):
                return
            self.cache.tables.admit(entry.sequence, shared=self._may_share(entry))
            entry.started = False
            self.running.append(self.waiting.popleft())

    def _may_share(self, entry: BatchEntry) -> bool:
        """Whether an entry can start from a cached prefix, for which no logits are computed."""
        return self._is_cacheable(entry.sequence) and not entry.completion.missing_prompt_logprobs

    def _refresh_prefix(self, entry: BatchEntry) -> None:
        """Let an entry that has not started use what others have computed since it joined."""
        self.cache.tables.release(entry.sequence)
        self.cache.tables.admit(entry.sequence, shared=True)

    def _should_wait(self, entry: BatchEntry, earlier: Sequence[BatchEntry]) -> bool:
        """Whether an earlier entry is about to compute the next page of this one, so that it can be shared a
        pass later."""
        sequence, page = entry.sequence, entry.sequence.computed // PAGE_SIZE
        end = (page + 1) * PAGE_SIZE
        if end >= len(sequence.tokens):  # the last token is never shared
            return False
        return any(other.sequence.computed < end <= len(other.sequence.tokens)
                   and self._is_cacheable(other.sequence)
                   and other.sequence.digest(page) == sequence.digest(page) for other in earlier)

    def _ready(self) -> list[BatchEntry]:
        """Return the entries that the next pass may compute, decode steps first."""
        ready = []
        for index, entry in enumerate(self.running):
            if not entry.started and self._may_share(entry):
                self._refresh_prefix(entry)
                if self._should_wait(entry, self.running[:index]):
                    continue
            ready.append(entry)
        return sorted(ready, key=lambda entry: entry.remaining > 1)

    def _schedule(self) -> list[ScheduledChunk]:
        """Return what the next pass computes: decode steps, longest sequence first as `Pass` prefers, then
        prefill chunks."""
        budget, prompt_budget = self.token_budget, self._max_prompt_logits
        chunks: list[tuple[BatchEntry, Chunk]] = []
        for entry in self._ready():
            needs_prompt_logits = entry.completion.missing_prompt_logprobs > 0
            count = min(entry.remaining, budget, self.cache.max_chunk)
            if needs_prompt_logits:
                count = min(count, prompt_budget)
            if count == 0 or entry not in self.running or not self._allocate(entry, count):
                continue
            entry.started = True
            budget -= count
            if needs_prompt_logits:
                prompt_budget -= count
            chunks.append((entry, Chunk(entry.sequence, entry.sequence.computed, count)))
        scheduled: list[ScheduledChunk] = []
        for entry, chunk in sorted(chunks, key=lambda pair: _pass_order(pair[1])):
            if entry in self.running:  # not preempted for another entry since
                scheduled.append(ScheduledChunk(entry, chunk, scheduled[-1].last + 1 if scheduled else 0))
        return scheduled

    def _allocate(self, entry: BatchEntry, count: int) -> bool:
        """Allocate pages for the next tokens, preempting the newest entries. Return False if that was the
        entry itself."""
        while not self.cache.tables.grow(entry.sequence, entry.sequence.computed + count):
            newest = self.running[-1]
            self._retire(newest)
            self.waiting.appendleft(newest)
            if newest is entry:
                return False
        return True

    def _retire(self, entry: BatchEntry) -> None:
        self.running.remove(entry)
        self.cache.tables.release(entry.sequence)

    def _push(self, entries: Sequence[BatchEntry], logits: Tensor) -> list[tuple[Completion, str]]:
        """Choose a token for each entry and return each completion with its new piece of text."""
        chosen = self.network.broadcast_ints(choose(logits, entries))
        details = _logprobs(logits, chosen, [entry.completion for entry in entries])
        updates = []
        for entry, token, (logprob, top) in zip(entries, chosen, details, strict=True):
            completion = entry.completion
            try:
                piece = _add_token(entry, token, logprob, top)
            except Exception as error:  # concerns this completion only; the others continue
                piece = completion.fail(error)
            updates.append((completion, piece))
            entry.sequence.tokens.append(token)
            if completion.finish_reason is not None:
                self._retire(entry)
            elif not self._is_cacheable(entry.sequence):
                self.cache.tables.release(entry.sequence)
                self.cache.tables.admit(entry.sequence, shared=False)
        return updates


def _pass_order(chunk: Chunk) -> tuple[bool, int]:
    """Return the sort key of a chunk in a pass."""
    prefill = chunk.count > 1
    return prefill, 0 if prefill else -chunk.start


def choose(logits: Tensor, entries: Sequence[BatchEntry]) -> list[int]:
    """Return a token for each row of logits [n, vocabulary]; NO_TOKEN if the sampler failed, with the error
    in the completion."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for index, entry in enumerate(entries):
        if not entry.sampler.is_argmax:
            try:
                tokens[index] = entry.sampler(logits[index])
            except Exception as error:
                tokens[index], entry.completion.error = NO_TOKEN, error
    return tokens


def _add_token(entry: BatchEntry, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> str:
    """Add the chosen token to a completion and return the new piece of text."""
    completion, constraint = entry.completion, entry.sampler.constraint
    if token == NO_TOKEN:
        raise completion.error or RuntimeError("the first rank could not choose a token")
    completion.error = None  # an error on this rank only: the first rank's choice counts
    if constraint is None:
        return completion.push(token, logprob, top)
    if constraint.stuck:
        return completion.end("stuck")
    piece = completion.push(token, logprob, top)
    constraint.accept(token)
    if constraint.done and completion.finish_reason is None:
        piece += completion.end("stop")
    return piece


def _add_prompt_logprobs(prompts: Sequence[tuple[Completion, range]], logits: Tensor) -> None:
    """Add prompt log-probabilities to completions, from the logits [n, vocabulary] after the given positions
    of each."""
    # log_softmax would make a second tensor of the size of the logits
    totals = logits.logsumexp(-1, keepdim=True)
    begin = 0
    for completion, positions in prompts:
        if not positions:
            continue
        rows = slice(begin, begin + len(positions))
        begin = rows.stop
        targets = torch.tensor([completion.request.prompt[position + 1] for position in positions],
                               device=logits.device)
        values, ids = logits[rows].topk(min(completion.request.top_logprobs, logits.size(1)))
        completion.prompt_top_logprobs += _pairs(ids, values - totals[rows])
        logprobs = logits[rows].gather(-1, targets[:, None]) - totals[rows]
        completion.prompt_logprobs += logprobs[:, 0].tolist()


def _logprobs(logits: Tensor, tokens: Sequence[int], completions: Sequence[Completion],
              ) -> list[tuple[float | None, TokenLogprobs]]:
    """Return, as far as requested, the log-probability of each token and of the most likely alternatives."""
    found: list[tuple[float | None, TokenLogprobs]] = [(None, [])] * len(tokens)
    rows = [row for row, completion in enumerate(completions) if completion.request.logprobs]
    if not rows:
        return found
    logprobs = logits[rows].log_softmax(-1)
    for index, row in enumerate(rows):
        values, ids = logprobs[index:index + 1].topk(min(completions[row].request.top_logprobs,
                                                         logprobs.size(1)))
        found[row] = logprobs[index, tokens[row]].item(), _pairs(ids, values)[0]
    return found


def _pairs(ids: Tensor, values: Tensor) -> list[TokenLogprobs]:
    """Return [n, k] ids and values as n lists of k (id, value)."""
    return [list(zip(row, numbers, strict=True))
            for row, numbers in zip(ids.tolist(), values.tolist(), strict=True)]
