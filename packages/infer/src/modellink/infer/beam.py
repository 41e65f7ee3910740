# SPDX-License-Identifier: Apache-2.0
"""Beam search over shared pages of the cache.

The rules are those of transformers. Of max(2, 1 + end tokens) x beams candidates, the best unfinished ones
continue; one of the first `beams` that ends is finished, with the score sum of log-probabilities / (tokens ^
length penalty). The search stops when no running hypothesis can beat the worst finished one (judged by its
present score, or, with `early_stopping` "never" and a positive length penalty, by its score at the maximum
length), as soon as `beams` are finished with `early_stopping` True, or at the maximum length. Not here: other
requests in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink.data_prep import Tokenizer
from modellink.infer.cache import PagedCache, rotary_depends_on_length
from modellink.infer.network import Network
from modellink.infer.pages import PAGE_SIZE, CachedSequence, Chunk
from modellink.infer.passes import Pass
from modellink.infer.request import Completion, Generation, GenerationRequest, TokenLogprobs
from modellink.infer.sampler import filter_logits, penalize
from modellink.infer.sampling import BeamSearch
from modellink.kernels.errors import ModelLinkError


@dataclass(frozen=True)
class Hypothesis:
    """A partial completion.

    Attributes:
        top: the most likely tokens at each position, if requested.
        total: sum of the log-probabilities.
        parent: row of the pass that it continues.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TokenLogprobs] = field(default_factory=list)
    total: float = 0.0
    parent: int = 0


@torch.inference_mode()
def search(network: Network, cache: PagedCache, request: GenerationRequest,
           tokenizer: Tokenizer | None) -> list[Generation]:
    """Return the best completions, best first.

    Raises:
        ModelLinkError: the cache is too small for so many beams.
    """
    beams = request.beams
    assert beams is not None
    _check(cache, request, beams.beams)
    generator = torch.Generator()
    generator.manual_seed(_seed(network, request))
    running, finished = [Hypothesis()], list[tuple[float, Hypothesis]]()
    sequences = [CachedSequence(list(request.prompt))]
    cache.tables.admit(sequences[0], shared=_is_cacheable(network, sequences[0]))
    try:
        _prefill(network, cache, sequences[0])
        while True:
            candidates = _candidates(_decode(network, cache, sequences), running, request, beams.beams,
                                     generator)
            unfinished = [one for one in candidates if not _is_finished(one, request, tokenizer)]
            for one in candidates[:beams.beams]:
                if one not in unfinished and not (beams.early_stopping is True
                                                  and len(finished) == beams.beams):
                    finished.append((_score(one, beams), one))
            finished = sorted(finished, key=lambda pair: -pair[0])[:beams.beams]
            running = unfinished[:beams.beams]
            if not running or _is_settled(running[0], finished, request.max_new_tokens, beams):
                break
            sequences = _continue(network, cache, sequences, running)
    finally:
        for sequence in sequences:
            cache.tables.release(sequence)
    return [_completion(request, tokenizer, one).generation(score) for score, one in finished[:beams.count]]


def _check(cache: PagedCache, request: GenerationRequest, beams: int) -> None:
    length = len(request.prompt) + request.max_new_tokens
    for pool in cache.pools:
        kept = length if pool.window is None else min(length, pool.window + 2 * PAGE_SIZE)
        pages = max(-(-kept // PAGE_SIZE) * beams, cache.max_pages(pool, len(request.prompt)))
        if pages > pool.available:
            raise ModelLinkError(f"{beams} beams of {length} tokens need {pages * PAGE_SIZE} tokens of "
                                 f"cache, {pool.available * PAGE_SIZE} are available",
                                 where="--cache-tokens, --batch-size",
                                 fix="use fewer beams or fewer new tokens")


def _prefill(network: Network, cache: PagedCache, sequence: CachedSequence) -> None:
    """Compute all tokens of a prompt but the last in chunks, which bound the pages that layers with a window
    need."""
    while (remaining := len(sequence.tokens) - 1 - sequence.computed) > 0:
        chunk = Chunk(sequence, sequence.computed, min(remaining, cache.max_chunk))
        cache.tables.grow(sequence, chunk.end)
        network.logits(Pass(cache, [chunk], []))
        cache.tables.advance(sequence, chunk.count, shared=_is_cacheable(network, sequence))


def _seed(network: Network, request: GenerationRequest) -> int:
    seed = request.sampling.seed
    return seed if seed is not None else int(network.broadcast(torch.seed() % 2**62))


def _is_cacheable(network: Network, sequence: CachedSequence) -> bool:
    return not rotary_depends_on_length(network.spec, len(sequence.tokens))


def _decode(network: Network, cache: PagedCache, sequences: Sequence[CachedSequence]) -> Tensor:
    """Return the log-probabilities [sequences, vocabulary] of the next token of each sequence."""
    for sequence in sequences:
        cache.tables.grow(sequence, len(sequence.tokens))
    chunks = [Chunk(sequence, sequence.computed, len(sequence.tokens) - sequence.computed)
              for sequence in sequences]
    logits = network.logits(Pass.after_each(cache, chunks))
    for chunk in chunks:
        cache.tables.advance(chunk.sequence, chunk.count, shared=_is_cacheable(network, chunk.sequence))
    return logits.log_softmax(-1).cpu()


def _candidates(logprobs: Tensor, running: Sequence[Hypothesis], request: GenerationRequest, beams: int,
                generator: torch.Generator) -> list[Hypothesis]:
    """Return the best or sampled continuations, best first."""
    sampling = request.sampling
    scores = logprobs
    if sampling.has_penalties:
        scores = torch.stack([penalize(row, sampling, request.prompt, one.tokens)
                              for row, one in zip(scores, running, strict=True)])
    if not sampling.greedy:
        scores = torch.stack([filter_logits(row, sampling) for row in scores])
    totals = (scores + torch.tensor([one.total for one in running])[:, None]).flatten()
    keep = min(max(2, 1 + len(request.stop_ids)) * beams, int(totals.isfinite().sum()))
    if sampling.greedy:
        best = totals.topk(keep).indices
    else:
        drawn = torch.multinomial(totals.softmax(-1), keep, generator=generator)
        best = drawn[totals[drawn].argsort(descending=True, stable=True)]
    tops = [_top(row, request.top_logprobs) for row in logprobs] if request.top_logprobs else []
    found = []
    for index in best.tolist():
        parent, token = divmod(index, logprobs.size(1))
        one = running[parent]
        top = [*one.top, tops[parent]] if tops else [*one.top, []]
        found.append(Hypothesis([*one.tokens, token], [*one.logprobs, logprobs[parent, token].item()], top,
                                totals[index].item(), parent))
    return found


def _top(logprobs: Tensor, count: int) -> TokenLogprobs:
    """Return the most likely tokens of log-probabilities [vocabulary]."""
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _is_finished(one: Hypothesis, request: GenerationRequest, tokenizer: Tokenizer | None) -> bool:
    if one.tokens[-1] in request.stop_ids or len(one.tokens) == request.max_new_tokens:
        return True
    return bool(request.stop_strings) and _completion(request, tokenizer, one).finish_reason is not None


def _score(one: Hypothesis, beams: BeamSearch, length: int | None = None) -> float:
    """Return the score of a hypothesis, or the score that its present total would have at another length."""
    return one.total / float((length or len(one.tokens)) ** beams.length_penalty)


def _is_settled(best: Hypothesis, finished: Sequence[tuple[float, Hypothesis]], longest: int,
                beams: BeamSearch) -> bool:
    """Whether no running hypothesis can beat the worst finished one."""
    if len(finished) < beams.beams:
        return False
    if beams.early_stopping is True:
        return True
    favors_length = beams.early_stopping == "never" and beams.length_penalty > 0
    return _score(best, beams, longest if favors_length else None) <= finished[-1][0]


def _continue(network: Network, cache: PagedCache, sequences: Sequence[CachedSequence],
              running: Sequence[Hypothesis]) -> list[CachedSequence]:
    """Return a sequence for each hypothesis: the first child takes its parent's sequence over, others fork
    it."""
    parents = {one.parent for one in running}
    for number, sequence in enumerate(sequences):
        if number not in parents:
            cache.tables.release(sequence)
    taken: set[int] = set()
    found = []
    for one in running:
        sequence = sequences[one.parent]
        found.append(cache.fork(sequence, list(sequence.tokens)) if one.parent in taken else sequence)
        taken.add(one.parent)
    for sequence, one in zip(found, running, strict=True):
        sequence.tokens.append(one.tokens[-1])
        if not _is_cacheable(network, sequence):
            cache.tables.release(sequence)
            cache.tables.admit(sequence, shared=False)
    return found


def _completion(request: GenerationRequest, tokenizer: Tokenizer | None, one: Hypothesis) -> Completion:
    completion = Completion.start(request, tokenizer)
    for token, logprob, top in zip(one.tokens, one.logprobs, one.top, strict=True):
        completion.push(token, logprob, top)
    return completion
