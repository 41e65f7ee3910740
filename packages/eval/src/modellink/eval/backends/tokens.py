"""Requests as token ids, the way lm-evaluation-harness splits them, with what a tokenizer puts before a text kept in front."""

from __future__ import annotations

from typing import NamedTuple

from modellink.data_prep import Tokenizer
from modellink.eval.backends.backend import Request


class Pair(NamedTuple):
    """Token ids of a context and of its continuation; `dropped` were cut from the context."""

    context: list[int]
    continuation: list[int]
    dropped: int


class PairEncoder:
    """Requests to pairs of at most `longest` + 1 tokens: the last token is predicted, not read."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        self.leading = leading_tokens(tokenizer)
        self._last: tuple[str, list[int]] | None = None  # the choices of a question share their context

    def __call__(self, request: Request) -> Pair:
        context = self._context(request.context)
        continuation = self._continuation(request, context)
        room = self.longest + 1 - len(continuation) - len(self.leading)
        kept = context if len(context) <= room else context[len(context) - room:]
        return Pair(self.leading + kept, continuation, len(context) - len(kept))

    def _context(self, text: str) -> list[int]:
        if self._last is None or self._last[0] != text:
            self._last = text, self.tokenizer.encode(text, add_special_tokens=False)
        return self._last[1]

    def _continuation(self, request: Request, context: list[int]) -> list[int]:
        if not request.alone:
            whole = self.tokenizer.encode(request.context + request.continuation, add_special_tokens=False)
            if len(whole) > len(context) and whole[:len(context)] == context:
                return whole[len(context):]
        own = self.tokenizer.encode(request.continuation, add_special_tokens=False)
        # A token that reaches over the boundary belongs to neither side: then the continuation is tokenised by itself.
        return own[-1:] if request.alone else own


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text (often the bos token), without what it may put after."""
    around, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    for start in range(len(around) - len(plain) + 1):
        if around[start:start + len(plain)] == plain:
            return around[:start]
    return []
