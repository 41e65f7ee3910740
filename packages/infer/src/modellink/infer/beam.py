"""Beam search: the most likely texts as wholes, several of which grow side by side over shared pages of the cache.

The rules are those of transformers: of max(2, 1 + end tokens) x beams candidates the best that go on are kept; one of the first
`beams` that ends is finished, with the score sum of log-probabilities / (tokens ^ length penalty). The search stops when no
running text can become better than the worst finished one (judged by its score now; with `early_stopping` "never" and a positive
length penalty by the score it would have at the longest answer), at once when all are finished with `early_stopping` True, or at
the longest answer. Not here: other requests in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink.data_prep import Tokenizer
from modellink.infer.cache import SIZE, PagedCache, Piece, Row, moves
from modellink.infer.network import Network
from modellink.infer.request import Answer, Beams, Generation, Request
from modellink.infer.sampling import narrow, penalise
from modellink.kernels.errors import ModelLinkError

Top = list[tuple[int, float]]


@dataclass(frozen=True)
class Text:
    """A text on its way: tokens of the answer, their log-probabilities, and what the search adds up."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)  # the most likely tokens in the place of each, where they are asked for
    total: float = 0.0
    parent: int = 0  # its row in the pass it came from


@torch.inference_mode()
def search(network: Network, cache: PagedCache, request: Request, tokenizer: Tokenizer | None) -> list[Generation]:
    """The best answers, best first.

    Raises:
        ModelLinkError: the cache is too small for so many texts.
    """
    beams = request.beams
    assert beams is not None
    _check(cache, request, beams.beams)
    generator = torch.Generator()
    generator.manual_seed(_seed(network, request))
    running, finished = [Text()], list[tuple[float, Text]]()
    rows = [Row(list(request.prompt))]
    cache.tables.admit(rows[0], shared=not _moving(network, rows[0]))
    try:
        _prefill(network, cache, rows[0])
        while True:
            candidates = _candidates(_pass(network, cache, rows), running, request, beams.beams, generator)
            going = [text for text in candidates if not _ends(text, request, tokenizer)]
            for text in candidates[:beams.beams]:
                if text not in going and not (beams.early_stopping is True and len(finished) == beams.beams):
                    finished.append((_score(text, beams), text))
            finished = sorted(finished, key=lambda item: -item[0])[:beams.beams]
            running = going[:beams.beams]
            if not running or _settled(running[0], finished, request.max_new_tokens, beams):
                break
            rows = _follow(network, cache, rows, running)
    finally:
        for row in rows:
            cache.tables.release(row)
    return [_answer(request, tokenizer, text).generation(score) for score, text in finished[:beams.count]]


def _check(cache: PagedCache, request: Request, beams: int) -> None:
    length = len(request.prompt) + request.max_new_tokens
    for pool in cache.pools:
        kept = length if pool.window is None else min(length, pool.window + 2 * SIZE)
        if (pages := max(-(-kept // SIZE) * beams, cache.pages_of(pool, len(request.prompt)))) > pool.available:
            raise ModelLinkError(f"{beams} beams of {length} tokens need {pages * SIZE} tokens of cache, there are "
                                 f"{pool.available * SIZE}", where="--cache-tokens, --batch-size",
                                 fix="use fewer beams or shorter answers")


def _prefill(network: Network, cache: PagedCache, row: Row) -> None:
    """All tokens of a prompt but the last, in pieces: a layer with a window has no room for more."""
    while (left := len(row.tokens) - 1 - row.computed) > 0:
        piece = Piece(row, row.computed, min(left, cache.piece))
        cache.tables.grow(row, row.computed + piece.count)
        ids = torch.tensor([row.tokens[piece.start:piece.start + piece.count]])
        network.logits(ids, cache.state([piece], []))
        cache.tables.advance(row, piece.count, shared=not _moving(network, row))


def _seed(network: Network, request: Request) -> int:
    seed = request.sampling.seed
    return seed if seed is not None else int(network.share(torch.seed() % 2**62))


def _moving(network: Network, row: Row) -> bool:
    return moves(network.spec, len(row.tokens))


def _pass(network: Network, cache: PagedCache, rows: Sequence[Row]) -> Tensor:
    """Log-probabilities [rows, vocabulary] of the token after each row."""
    for row in rows:
        cache.tables.grow(row, len(row.tokens))
    pieces = [Piece(row, row.computed, len(row.tokens) - row.computed) for row in rows]
    ids = torch.tensor([[token for piece in pieces for token in piece.row.tokens[piece.start:]]])
    logits = network.logits(ids, cache.state(pieces))[0]
    for piece in pieces:
        cache.tables.advance(piece.row, piece.count, shared=not _moving(network, piece.row))
    return logits.log_softmax(-1).cpu()


def _candidates(logprobs: Tensor, running: Sequence[Text], request: Request, beams: int,
                generator: torch.Generator) -> list[Text]:
    """The best continuations, or drawn ones, best first."""
    rules = request.sampling
    scores = logprobs
    if rules.penalised:
        scores = torch.stack([penalise(row, rules, request.prompt, text.tokens)
                              for row, text in zip(scores, running, strict=True)])
    if not rules.greedy:
        scores = torch.stack([narrow(row, rules) for row in scores])
    totals = (scores + torch.tensor([text.total for text in running])[:, None]).flatten()
    keep = min(max(2, 1 + len(request.stop_ids)) * beams, int(totals.isfinite().sum()))
    if rules.greedy:
        best = totals.topk(keep).indices
    else:
        drawn = torch.multinomial(totals.softmax(-1), keep, generator=generator)
        best = drawn[totals[drawn].argsort(descending=True, stable=True)]
    tops = [_top(row, request.top_logprobs) for row in logprobs] if request.top_logprobs else []
    found = []
    for place in best.tolist():
        parent, token = divmod(place, logprobs.size(1))
        text = running[parent]
        found.append(Text([*text.tokens, token], [*text.logprobs, logprobs[parent, token].item()],
                          [*text.top, tops[parent] if tops else []], totals[place].item(), parent))
    return found


def _top(logprobs: Tensor, count: int) -> Top:
    """The most likely tokens of log-probabilities [vocabulary]."""
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _ends(text: Text, request: Request, tokenizer: Tokenizer | None) -> bool:
    if text.tokens[-1] in request.stop_ids or len(text.tokens) == request.max_new_tokens:
        return True
    return bool(request.stop_strings) and _answer(request, tokenizer, text).finish_reason is not None


def _score(text: Text, beams: Beams, length: int | None = None) -> float:
    """As it is, or with the probability it has now at another length."""
    return text.total / float((length or len(text.tokens)) ** beams.length_penalty)


def _settled(best: Text, finished: Sequence[tuple[float, Text]], longest: int, beams: Beams) -> bool:
    """Whether what runs cannot win any more."""
    if len(finished) < beams.beams:
        return False
    may_grow = beams.early_stopping == "never" and beams.length_penalty > 0  # long texts win
    return beams.early_stopping is True or _score(best, beams, longest if may_grow else None) <= finished[-1][0]


def _follow(network: Network, cache: PagedCache, rows: Sequence[Row], running: Sequence[Text]) -> list[Row]:
    """Rows for the texts that go on: the first child of a row takes it over, others get a copy of the page in work."""
    parents = {text.parent for text in running}
    for number, row in enumerate(rows):
        if number not in parents:
            cache.tables.release(row)
    taken: set[int] = set()
    found = []
    for text in running:
        row = rows[text.parent]
        found.append(cache.fork(row, list(row.tokens)) if text.parent in taken else row)
        taken.add(text.parent)
    for row, text in zip(found, running, strict=True):
        row.tokens.append(text.tokens[-1])
        if _moving(network, row):
            cache.tables.release(row)
            cache.tables.admit(row, shared=False)
    return found


def _answer(request: Request, tokenizer: Tokenizer | None, text: Text) -> Answer:
    answer = Answer.to(request, tokenizer)
    for token, logprob, top in zip(text.tokens, text.logprobs, text.top, strict=True):
        answer.push(token, logprob, top)
    return answer
