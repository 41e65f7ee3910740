"""Continuous batching: requests join and leave a running batch, a pass at a time.

A pass takes the newest token of every row that is being answered, and with what is left of its budget pieces of prompts. A row
for which there are no pages any more goes back to the queue and is computed anew later. Every rank runs the same steps; the first
one's choice of tokens, and its wishes to stop, hold for all. Not here: beams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.data_prep import Tokenizer
from modellink.infer.cache import SIZE, PagedCache, Piece, Row, moves
from modellink.infer.constraint import Constraint
from modellink.infer.network import PASS_LOGITS, Network
from modellink.infer.request import Answer, NoRoom, Request
from modellink.infer.sampling import Chooser
from modellink.kernels.errors import ModelLinkError

NONE = -1  # in the place of a token that could not be chosen


class TooLong(NoRoom):
    """The cache will never hold a sequence."""


@dataclass(eq=False)
class Member:
    """An answer in the batch."""

    answer: Answer
    row: Row
    chooser: Chooser
    begun: bool = False  # a piece of it was computed since it joined

    @property
    def left(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.row.tokens) - self.row.computed


@dataclass(frozen=True)
class Share:
    """What one pass computes of a member. All of it is asked before the pass: afterwards the member is further on."""

    member: Member
    piece: Piece
    begin: int  # where in the pass its first token stands

    @property
    def last(self) -> int:
        """Where in the pass its last token stands."""
        return self.begin + self.piece.count - 1

    @property
    def complete(self) -> bool:
        """Whether all tokens of the row are then computed."""
        return self.piece.count == self.member.left

    @property
    def chooses(self) -> bool:
        """Whether the answer then gets a token; one that is only asked about its prompt gets none."""
        return self.complete and self.member.answer.request.max_new_tokens > 0

    @property
    def asked(self) -> range:
        """The tokens of the row after which the log-probability of the prompt's next one is wanted and not known yet."""
        answer, piece = self.member.answer, self.piece
        if not answer.prompt_left:
            return range(0)
        known, last = len(answer.prompt_logprobs), len(answer.request.prompt) - 1
        return range(max(piece.start, known), min(piece.start + piece.count, last))

    @property
    def asked_places(self) -> list[int]:
        """Where in the pass those stand."""
        return [self.begin + token - self.piece.start for token in self.asked]


class Batch:
    """Answers that are computed together.

    Args:
        rows: how many at most.
        budget: tokens of a pass at most, where prompts are computed; single new tokens of all rows always fit.
        tokenizer: for answers that keep to a grammar.
    """

    def __init__(self, network: Network, cache: PagedCache, *, rows: int, budget: int,
                 tokenizer: Tokenizer | None = None) -> None:
        self.network, self.cache, self.rows, self.budget = network, cache, rows, max(budget, rows)
        self.tokenizer = tokenizer
        self.waiting: deque[Member] = deque()
        self.running: list[Member] = []
        self._most_asked = max(1, PASS_LOGITS // network.spec.vocab_size)  # tokens of a prompt in a pass whose logits are kept

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, answer: Answer) -> None:
        """Let an answer join at the next step.

        Raises:
            ModelLinkError: the cache will never hold it.
        """
        self.check(answer.request)
        row = Row([*answer.request.prompt, *answer.token_ids])
        chooser = Chooser(answer.request.sampling, self.network.device, answer.request.prompt, answer.token_ids,
                          self._constraint(answer))
        self.waiting.append(Member(answer, row, chooser))

    def _constraint(self, answer: Answer) -> Constraint | None:
        if answer.request.grammar is None:
            return None
        assert self.tokenizer is not None
        constraint = Constraint(self.tokenizer, answer.request.grammar, answer.request.stop_ids)
        for token in answer.token_ids:
            constraint.take(token)
        return constraint

    def check(self, request: Request) -> None:
        """Raise where the cache will never hold a request."""
        need = len(request.prompt) + request.max_new_tokens
        if need > self.cache.tokens:
            raise TooLong(f"a sequence of {need} tokens does not fit into a cache of {self.cache.tokens}",
                          where="--cache-tokens", fix="make the cache larger, or the prompt or answer shorter")

    def remove(self, answer: Answer) -> None:
        """Take an answer out, finished or not."""
        self.waiting = deque(member for member in self.waiting if member.answer is not answer)
        for member in [member for member in self.running if member.answer is answer]:
            self._leave(member)

    @torch.inference_mode()
    def step(self) -> list[tuple[Answer, str]]:
        """One pass; the answers that got a token or came to an end, each with the new piece of its text (which may be empty)."""
        cancelled = self._drop_cancelled()
        self._join()
        shares = self._shares()
        if not shares:
            if self.waiting and not self.running and not cancelled:
                raise ModelLinkError("answers of other batches hold the pages this one needs", where="--cache-tokens",
                                     fix="take the other streams to their end first, or make the cache larger")
            return cancelled
        chosen = [share for share in shares if share.chooses]
        ended = [share.member for share in shares if share.complete and not share.chooses]
        asked = [(share.member.answer, share.asked) for share in shares]
        prompts = [place for share in shares for place in share.asked_places]
        logits = self._logits([share.piece for share in shares], prompts + [share.last for share in chosen])
        if prompts:
            _note_prompts(asked, logits[:len(prompts)])
        for member in ended:
            self._leave(member)
        told = cancelled + [(member.answer, member.answer.end("length")) for member in ended]
        return told + (self._push([share.member for share in chosen], logits[len(prompts):]) if chosen else [])

    def _logits(self, pieces: Sequence[Piece], places: Sequence[int]) -> Tensor:
        """Compute a pass over pieces: logits [places, vocabulary] after those tokens of it."""
        ids = [token for piece in pieces for token in piece.row.tokens[piece.start:piece.start + piece.count]]
        logits = self.network.logits(torch.tensor([ids]), self.cache.state(pieces, places))[0]
        for piece in pieces:
            self.cache.tables.advance(piece.row, piece.count, shared=not self._moving(piece.row))
        return logits

    def _moving(self, row: Row) -> bool:
        return moves(self.network.spec, len(row.tokens))

    def _drop_cancelled(self) -> list[tuple[Answer, str]]:
        """End the answers that the first rank does not want any more, also those whose prompt is still computed."""
        members = [*self.running, *self.waiting]
        wishes = self.network.agree([int(member.answer.cancelled) for member in members]) if members else []
        dropped = [member.answer for member, wish in zip(members, wishes, strict=True) if wish]
        for answer in dropped:
            self.remove(answer)
        return [(answer, answer.end("cancelled")) for answer in dropped]

    def _join(self) -> None:
        """Let those that wait join, in their order, as long as there is room for their prompts."""
        while self.waiting and len(self.running) < self.rows:
            member = self.waiting[0]
            length = len(member.row.tokens) + 1
            if self.running and any(self.cache.pages_of(pool, length) > pool.available for pool in self.cache.pools):
                return
            self.cache.tables.admit(member.row, shared=self._may_share(member))
            member.begun = False
            self.running.append(self.waiting.popleft())

    def _may_share(self, member: Member) -> bool:
        """Whether a row may begin with what others computed, of which there are no logits any more."""
        return not self._moving(member.row) and not member.answer.prompt_left

    def _look_again(self, member: Member) -> None:
        """Let a row of which nothing was computed yet begin with what others computed since it joined."""
        self.cache.tables.release(member.row)
        self.cache.tables.admit(member.row, shared=True)

    def _waits(self, member: Member, earlier: Sequence[Member]) -> bool:
        """Whether a row that joined earlier computes the next page of this one too: a pass later it is there."""
        row, page = member.row, member.row.computed // SIZE
        end = (page + 1) * SIZE
        if end >= len(row.tokens):  # its last token is computed in any case
            return False
        return any(other.row.computed < end <= len(other.row.tokens) and not self._moving(other.row)
                   and other.row.digest(page) == row.digest(page) for other in earlier)

    def _ready(self) -> list[Member]:
        """The rows that the next pass may compute something of, those with a single token first."""
        found = []
        for place, member in enumerate(self.running):
            if not member.begun and self._may_share(member):
                self._look_again(member)
                if self._waits(member, self.running[:place]):
                    continue
            found.append(member)
        return sorted(found, key=lambda member: member.left > 1)

    def _shares(self) -> list[Share]:
        """What the next pass computes: single tokens, of the longest rows first, which the cache likes; then prompts."""
        budget, room = self.budget, self._most_asked
        pieces: list[tuple[Member, Piece]] = []
        for member in self._ready():
            count = min(member.left, budget, self.cache.piece, room if member.answer.prompt_left else budget)
            if count == 0 or member not in self.running or not self._room(member, count):
                continue
            member.begun = True
            budget, room = budget - count, room - (count if member.answer.prompt_left else 0)
            pieces.append((member, Piece(member.row, member.row.computed, count)))
        found: list[Share] = []
        for member, piece in sorted(pieces, key=lambda pair: (1, 0) if pair[1].count > 1 else (0, -pair[1].start)):
            if member in self.running:  # another one did not need its pages
                found.append(Share(member, piece, found[-1].last + 1 if found else 0))
        return found

    def _room(self, member: Member, count: int) -> bool:
        """Pages for the next tokens of a row, at the cost of those that joined later; False where it was itself the last."""
        while not self.cache.tables.grow(member.row, member.row.computed + count):
            last = self.running[-1]
            self._leave(last)
            self.waiting.appendleft(last)
            if last is member:
                return False
        return True

    def _leave(self, member: Member) -> None:
        self.running.remove(member)
        self.cache.tables.release(member.row)

    def _push(self, members: Sequence[Member], logits: Tensor) -> list[tuple[Answer, str]]:
        """Choose a token for each of them."""
        chosen = self.network.agree(choose(logits, members))
        details = _logprobs(logits, chosen, [member.answer for member in members])
        pieces = []
        for member, token, (logprob, top) in zip(members, chosen, details, strict=True):
            answer = member.answer
            try:
                piece = _say(member, token, logprob, top)
            except Exception as fault:  # of this answer; the others are to go on
                piece = answer.fail(fault)
            pieces.append((answer, piece))
            member.row.tokens.append(token)
            if answer.finish_reason is not None:
                self._leave(member)
            elif self._moving(member.row):
                self.cache.tables.release(member.row)
                self.cache.tables.admit(member.row, shared=False)
        return pieces


def choose(logits: Tensor, members: Sequence[Member]) -> list[int]:
    """Logits [n, vocabulary] -> a token for each row; NONE where its chooser failed, which its answer then says."""
    best: list[int] = logits.argmax(-1).tolist()
    for place, member in enumerate(members):
        if not member.chooser.plain:
            try:
                best[place] = member.chooser(logits[place])
            except Exception as fault:
                best[place], member.answer.fault = NONE, fault
    return best


def _say(member: Member, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> str:
    """Let an answer have its next token; the piece of text that became certain."""
    answer, constraint = member.answer, member.chooser.constraint
    if token == NONE:
        raise answer.fault or RuntimeError("the first rank could not choose a token")
    answer.fault = None  # of this rank alone; the first one's choice holds
    if constraint is None:
        return answer.push(token, logprob, top)
    if constraint.stuck:
        return answer.end("stuck")
    piece = answer.push(token, logprob, top)
    constraint.take(token)
    if constraint.done and answer.finish_reason is None:
        piece += answer.end("stop")
    return piece


def _note_prompts(asked: Sequence[tuple[Answer, range]], logits: Tensor) -> None:
    """Logits [n, vocabulary] after tokens of prompts, those of one answer after the other, become log-probabilities."""
    totals, place = logits.logsumexp(-1, keepdim=True), 0  # not log_softmax: that is a second tensor of this size
    for answer, places in asked:
        rows, total, place = logits[place:place + len(places)], totals[place:place + len(places)], place + len(places)
        if not places:
            continue
        targets = torch.tensor([answer.request.prompt[before + 1] for before in places], device=rows.device)
        values, ids = rows.topk(min(answer.request.top_logprobs, rows.size(1)))
        answer.prompt_top_logprobs += [list(zip(*pair, strict=True)) for pair in zip(
            ids.tolist(), (values - total).tolist(), strict=True)]
        answer.prompt_logprobs += (rows.gather(-1, targets[:, None]) - total)[:, 0].tolist()


def _logprobs(logits: Tensor, tokens: Sequence[int], answers: Sequence[Answer],
              ) -> list[tuple[float | None, list[tuple[int, float]]]]:
    """For each row the log-probability of its token and of the most likely ones, as far as they were asked for."""
    found: list[tuple[float | None, list[tuple[int, float]]]] = [(None, [])] * len(tokens)
    rows = [row for row, answer in enumerate(answers) if answer.request.logprobs]
    if not rows:
        return found
    logprobs = logits[rows].log_softmax(-1)
    for place, row in enumerate(rows):
        values, ids = logprobs[place].topk(min(answers[row].request.top_logprobs, logprobs.size(1)))
        found[row] = logprobs[place, tokens[row]].item(), list(zip(ids.tolist(), values.tolist(), strict=True))
    return found
