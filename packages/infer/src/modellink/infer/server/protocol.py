# SPDX-License-Identifier: Apache-2.0
"""The response objects of OpenAI's API. Plain dicts; nothing here waits or computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modellink.data_prep import StreamDecoder, Tokenizer
from modellink.infer.request import Completion, GenerationRequest
from modellink.infer.server.body import CompletionCall

FINISH_REASONS = {"stuck": "length"}
"""Finish reasons that the API does not know, as those it does: a stuck completion was cut off."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a prompt or a completion with its log-probability.

    Attributes:
        logprob: None for the first token of a prompt.
        top: the most likely tokens at its position; None for the first token of a prompt.
        offset: length of the text before it, in characters.
    """

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None
    offset: int


def usage(completions: Sequence[Completion], prompts: int) -> dict[str, int]:
    """Return the token counts; each prompt counts once."""
    per_prompt = max(1, len(completions) // prompts)
    prompt_tokens = sum(len(completion.request.prompt) for completion in completions[::per_prompt])
    generated = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated}


def logprobs(completion: Completion, tokenizer: Tokenizer | None, start: int, *,
             chat: bool) -> tuple[dict[str, Any] | None, int]:
    """Return the log-probabilities of the tokens from number `start` in the API's form, and where the next
    ones start.

    Tokens of an echoed prompt count.
    """
    if not completion.request.logprobs:
        return None, start
    entries = _entries(completion, tokenizer, start)
    return (_chat_logprobs if chat else _text_logprobs)(entries, tokenizer), start + len(entries)


def _entries(completion: Completion, tokenizer: Tokenizer | None, start: int) -> list[TokenLogprob]:
    """Return the tokens from number `start`: of the prompt, if its log-probabilities are requested, and of
    the completion."""
    request, found = completion.request, list[TokenLogprob]()
    prompt_tokens = len(request.prompt) if request.prompt_logprobs else 0
    if start < prompt_tokens:
        found += map(TokenLogprob, request.prompt, [None, *completion.prompt_logprobs],
                     [None, *completion.prompt_top_logprobs], _prompt_offsets(request, tokenizer))
    length = min(len(completion.token_ids), len(completion.logprobs), len(completion.top_logprobs),
                 len(completion.offsets))  # another thread may be appending to them
    for index in range(max(0, start - prompt_tokens), length):
        found.append(TokenLogprob(completion.token_ids[index], completion.logprobs[index],
                                  completion.top_logprobs[index],
                                  len(request.text_prefix) + completion.offsets[index]))
    return found


def _chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> dict[str, Any]:
    def describe(token: int, value: float | None) -> dict[str, Any]:
        text = _text(token, tokenizer)
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}
    return {"content": [describe(entry.token, entry.logprob) | {"top_logprobs": [describe(*other)
                                                                                 for other in entry.top
                                                                                 or ()]}
                        for entry in entries]}


def _text_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"tokens": [_text(entry.token, tokenizer) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_alternatives(entry, tokenizer) for entry in entries],
            "text_offset": [entry.offset for entry in entries]}


def _alternatives(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, float] | None:
    """Return the most likely tokens and the chosen one, most likely first."""
    if entry.logprob is None or entry.top is None:
        return None
    found: dict[str, float] = {}
    for token, value in sorted([*entry.top, (entry.token, entry.logprob)], key=lambda pair: -pair[1]):
        found.setdefault(_text(token, tokenizer), value)  # parts of characters have the same text
    return found


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    return tokenizer.decode([token], skip_special_tokens=False) if tokenizer else str(token)


def _prompt_offsets(request: GenerationRequest, tokenizer: Tokenizer | None) -> list[int]:
    """Return for each prompt token the characters of the echoed text before it; tokens added in front of the
    text have 0."""
    if tokenizer is None:
        return [0] * len(request.prompt)
    offsets: list[int] = []
    for skip in (False, True):
        decoder, text, offsets = StreamDecoder(tokenizer, skip_special_tokens=skip), "", []
        for token in request.prompt:
            offsets.append(len(text))
            text += decoder.push(token)
        text += decoder.finish()
        if text.endswith(request.text_prefix):
            return [max(0, offset - len(text) + len(request.text_prefix)) for offset in offsets]
    return [min(offset, len(request.text_prefix)) for offset in offsets]


def full_response(call: CompletionCall, completions: Sequence[Completion],
                  tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the response object of a call without streaming."""
    choices = []
    for index, completion in enumerate(completions):
        content: dict[str, Any]
        if call.chat:
            content = {"message": {"role": "assistant", "content": completion.text.text}}
        else:
            content = {"text": completion.request.text_prefix + completion.text.text}
        choices.append({"index": index, **content, "finish_reason": finish_reason(completion),
                        "logprobs": logprobs(completion, tokenizer, 0, chat=call.chat)[0]})
    return _envelope(call, "") | {"choices": choices, "usage": usage(completions, call.prompts)}


def finish_reason(completion: Completion) -> str | None:
    reason = completion.finish_reason
    return None if reason is None else FINISH_REASONS.get(reason, reason)


def chunk(call: CompletionCall, index: int, piece: str | None, *, first: bool, finish: str | None = None,
          probabilities: dict[str, Any] | None = None, echo: str = "") -> dict[str, Any]:
    """Return the object of a streamed piece of text; with `piece` None it only carries the finish reason."""
    content: dict[str, Any]
    if call.chat:
        delta = {"role": "assistant"} if first else {}
        if piece is not None:
            delta["content"] = piece
        content = {"delta": delta}
    else:
        content = {"text": (echo if first else "") + (piece or "")}
    choice = {"index": index, **content, "finish_reason": finish, "logprobs": probabilities}
    return _envelope(call, ".chunk") | {"choices": [choice]} | ({"usage": None} if call.usage else {})


def usage_chunk(call: CompletionCall, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the chunk with the token counts at the end of a stream."""
    return _envelope(call, ".chunk") | {"choices": [], "usage": usage(completions, call.prompts)}


def _envelope(call: CompletionCall, kind: str) -> dict[str, Any]:
    return {"id": call.id, "object": f"chat.completion{kind}" if call.chat else "text_completion",
            "created": call.created, "model": call.model}
