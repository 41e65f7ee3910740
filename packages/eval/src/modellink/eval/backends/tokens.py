# SPDX-License-Identifier: Apache-2.0
"""Encode requests to token ids as lm-evaluation-harness does, with the tokenizer's leading tokens kept in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from modellink.data_prep import ChatFormat, Tokenizer, chat_format, from_messages
from modellink.eval.backends.backend import Context, GenerationRequest, LikelihoodRequest
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError


class Pair(NamedTuple):
    """Token ids of a context and of its continuation; `dropped` ids were cut from the context."""

    context: list[int]
    continuation: list[int]
    dropped: int


def open_chat(tokenizer: Tokenizer, chat: str | None) -> ChatFormat | None:
    """Return the template of that name; raise ModelLinkError if it is unknown."""
    if chat is None:
        return None
    return chat_format(tokenizer, hf_chat_template=True) if chat == HF_CHAT_TEMPLATE else chat_format(tokenizer, chat)


class Encoder:
    """Encode requests to at most `longest` input tokens; the last token of a pair is predicted, not an input.

    Attributes:
        stop_ids: tokens that end an answer in a chat.
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
            return Pair(continuation[:1], continuation[1:], 0)  # it already has the leading tokens
        kept, dropped = self._cut(context, self.longest + 1 - len(continuation), request.context)
        return Pair(kept, continuation, dropped)

    def prompt(self, request: GenerationRequest) -> tuple[list[int], int]:
        """Return the ids of a context, cut to leave room for the generated text, and the number of ids cut."""
        room = self.longest - request.max_tokens
        if room < 1:
            raise ModelLinkError(f"{request.max_tokens} tokens are requested, the model's longest sequence is {self.longest}",
                                 where="--max-new-tokens", fix="request fewer")
        return self._cut(self._context(request.context), room, request.context)

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Split a text into pairs of context and target, with each token a target once, as the harness does.

        The first context is the beginning token, or else the end token, even if the tokenizer adds one itself. The last window
        has as much context as fits.
        """
        ids = self.tokenizer.encode(text)
        pairs = [(self._before_all(), ids[:self.longest])]
        for start in range(self.longest, len(ids), self.longest):
            end = min(start + self.longest, len(ids))
            pairs.append((ids[end - self.longest - 1:start], ids[start:end]))
        return pairs

    def _cut(self, ids: list[int], room: int, context: Context) -> tuple[list[int], int]:
        leading = self.leading if isinstance(context, str) else []  # the chat template adds the leading tokens
        room -= len(leading)
        kept = ids if len(ids) <= room else ids[len(ids) - room:]
        return leading + kept or self._before_all(), len(ids) - len(kept)

    def _before_all(self) -> list[int]:
        """Return the token before a text without context: the beginning token, or else the first end token."""
        first = self.tokenizer.bos_token_id
        before = [first] if first is not None else list(self.tokenizer.eos_token_ids[:1])
        if not before:
            raise ModelLinkError("an empty context needs a beginning or end token, and the tokenizer defines neither",
                                 where=self.tokenizer.folder, fix="set bos_token or eos_token in its tokenizer_config.json")
        return before

    def _context(self, context: Context) -> list[int]:
        if self._last is None or self._last[0] != context:
            self._last = context, self._encode(context)
        return self._last[1]

    def _encode(self, context: Context) -> list[int]:
        if isinstance(context, str):
            return self.tokenizer.encode(context, add_special_tokens=False)
        if self._chat is None:
            raise ModelLinkError("chats need a template", where="--prompt-type", fix="pass --prompt-type or --hf-chat-template")
        return self._chat.encode(from_messages([{"role": turn.role, "content": turn.text} for turn in context])).ids

    def _continuation(self, request: LikelihoodRequest, context: list[int]) -> list[int]:
        if not request.alone and isinstance(request.context, str):
            whole = self.tokenizer.encode(request.context + request.continuation, add_special_tokens=False)
            if len(whole) > len(context) and whole[:len(context)] == context:
                return whole[len(context):]
        own = self.tokenizer.encode(request.continuation, add_special_tokens=False)
        # A token that spans the boundary belongs to neither side: then the continuation is tokenized on its own.
        return own[-1:] if request.alone else own


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer adds before every text (often bos), without those it may add after."""
    around, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    for start in range(len(around) - len(plain) + 1):
        if around[start:start + len(plain)] == plain:
            return around[:start]
    return []
