"""Requests as token ids, the way lm-evaluation-harness splits them, with what a tokenizer puts before a text kept in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from modellink.data_prep import ChatFormat, Tokenizer, chat_format, from_messages
from modellink.eval.backends.backend import Context, GenerationRequest, LikelihoodRequest
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError


class Pair(NamedTuple):
    """Token ids of a context and of its continuation; `dropped` were cut from the context."""

    context: list[int]
    continuation: list[int]
    dropped: int


def open_chat(tokenizer: Tokenizer, chat: str | None) -> ChatFormat | None:
    """The template of that name; raises ModelLinkError where there is none."""
    if chat is None:
        return None
    return chat_format(tokenizer, hf_chat_template=True) if chat == HF_CHAT_TEMPLATE else chat_format(tokenizer, chat)


class Encoder:
    """Requests to ids of at most `longest` tokens read: of a pair the last token is predicted, not read.

    Attributes:
        stop_ids: what ends an answer in a chat.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int, chat: str | None = None) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        self.leading = leading_tokens(tokenizer)
        self._chat = open_chat(tokenizer, chat)
        self.stop_ids = self._chat.stop_token_ids if self._chat else ()
        self._last: tuple[Context, list[int]] | None = None  # the choices of a question share their context

    def pairs(self, requests: Sequence[LikelihoodRequest]) -> list[Pair]:
        return [self(request) for request in requests]

    def __call__(self, request: LikelihoodRequest) -> Pair:
        context = self._context(request.context)
        continuation = self._continuation(request, context)
        if not context and not self.leading and len(continuation) > 1 and continuation[:1] == self._before_all():
            return Pair(continuation[:1], continuation[1:], 0)  # it brings what would be put before it
        kept, dropped = self._cut(context, self.longest + 1 - len(continuation), request.context)
        return Pair(kept, continuation, dropped)

    def prompt(self, request: GenerationRequest) -> tuple[list[int], int]:
        """The ids of a context with room for what is to be written, and how many were cut from it."""
        room = self.longest - request.max_tokens
        if room < 1:
            raise ModelLinkError(f"{request.max_tokens} tokens are to be written; the model's longest sequence is {self.longest}",
                                 where="--max-new-tokens", fix="ask for fewer")
        return self._cut(self._context(request.context), room, request.context)

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text as pairs of what stands before and what is asked about, each token asked once, as the harness cuts it.

        Before the first stands the beginning token, or else the end token, also where the tokenizer puts one there itself; the
        last one is given as much of the text before it as fits.
        """
        ids = self.tokenizer.encode(text)
        pairs = [(self._before_all(), ids[:self.longest])]
        for start in range(self.longest, len(ids), self.longest):
            end = min(start + self.longest, len(ids))
            pairs.append((ids[end - self.longest - 1:start], ids[start:end]))
        return pairs

    def _cut(self, ids: list[int], room: int, context: Context) -> tuple[list[int], int]:
        leading = self.leading if isinstance(context, str) else []  # a chat's template says what it begins with
        room -= len(leading)
        kept = ids if len(ids) <= room else ids[len(ids) - room:]
        return leading + kept or self._before_all(), len(ids) - len(kept)

    def _before_all(self) -> list[int]:
        """What stands before a text that follows nothing: the beginning token, or else the first end token."""
        first = self.tokenizer.bos_token_id
        before = [first] if first is not None else list(self.tokenizer.eos_token_ids[:1])
        if not before:
            raise ModelLinkError("an empty context cannot be read: the tokenizer has neither a beginning nor an end token",
                                 where=self.tokenizer.folder, fix="name one in its tokenizer_config.json")
        return before

    def _context(self, context: Context) -> list[int]:
        if self._last is None or self._last[0] != context:
            self._last = context, self._encode(context)
        return self._last[1]

    def _encode(self, context: Context) -> list[int]:
        if isinstance(context, str):
            return self.tokenizer.encode(context, add_special_tokens=False)
        if self._chat is None:
            raise ModelLinkError("chats need a template", where="--prompt-type", fix="name one, or pass --hf-chat-template")
        return self._chat.encode(from_messages([{"role": turn.role, "content": turn.text} for turn in context])).ids

    def _continuation(self, request: LikelihoodRequest, context: list[int]) -> list[int]:
        if not request.alone and isinstance(request.context, str):
            whole = self.tokenizer.encode(request.context + request.continuation, add_special_tokens=False)
            if len(whole) > len(context) and whole[:len(context)] == context:
                return whole[len(context):]
        own = self.tokenizer.encode(request.continuation, add_special_tokens=False)
        # A token that reaches over the boundary belongs to neither side: then the continuation is tokenized by itself.
        return own[-1:] if request.alone else own


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text (often the bos token), without what it may put after."""
    around, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    for start in range(len(around) - len(plain) + 1):
        if around[start:start + len(plain)] == plain:
            return around[:start]
    return []
