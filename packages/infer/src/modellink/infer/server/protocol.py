"""The objects of OpenAI's API that answer a body. Plain dicts; nothing here waits or computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modellink.data_prep import StreamDecoder, Tokenizer
from modellink.infer.request import Answer, Request
from modellink.infer.server.body import Asked

ENDS = {"stuck": "length"}
"""What the API calls an end, where it has another word: an answer that became too complex to follow was cut."""


@dataclass(frozen=True)
class Said:
    """A token of a prompt or an answer, as far as it is told about."""

    token: int
    logprob: float | None  # None: it is the first of a prompt
    top: Sequence[tuple[int, float]] | None  # the most likely ones in its place
    offset: int  # characters before it


def usage(answers: Sequence[Answer], prompts: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of all answers."""
    each = max(1, len(answers) // prompts)
    asked, made = sum(len(answer.request.prompt) for answer in answers[::each]), sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def logprobs(answer: Answer, tokenizer: Tokenizer | None, start: int, *, chat: bool) -> tuple[dict[str, Any] | None, int]:
    """Those of the tokens from `start`, as the API writes them, and where the next ones start; an echoed prompt counts too."""
    if not answer.request.logprobs:
        return None, start
    said = _said(answer, tokenizer, start)
    return (_of_chat if chat else _of_text)(said, tokenizer), start + len(said)


def _said(answer: Answer, tokenizer: Tokenizer | None, start: int) -> list[Said]:
    """The tokens from `start`: of the prompt, where its log-probabilities were asked for, and of the answer so far."""
    asked, found = answer.request, list[Said]()
    told = len(asked.prompt) if asked.prompt_logprobs else 0
    if start < told:
        found += map(Said, asked.prompt, [None, *answer.prompt_logprobs], [None, *answer.prompt_top_logprobs],
                     _offsets(asked, tokenizer))
    first = max(0, start - told)
    places = range(first, min(len(answer.token_ids), len(answer.logprobs), len(answer.top_logprobs), len(answer.offsets)))
    return found + [Said(answer.token_ids[place], answer.logprobs[place], answer.top_logprobs[place],
                         len(asked.before) + answer.offsets[place]) for place in places]  # the answer may be growing


def _of_chat(said: Sequence[Said], tokenizer: Tokenizer | None) -> dict[str, Any]:
    def entry(token: int, value: float | None) -> dict[str, Any]:
        text = _text(token, tokenizer)
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}
    return {"content": [entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top or ()]}
                        for one in said]}


def _of_text(said: Sequence[Said], tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"tokens": [_text(one.token, tokenizer) for one in said], "token_logprobs": [one.logprob for one in said],
            "top_logprobs": [_best(one, tokenizer) for one in said], "text_offset": [one.offset for one in said]}


def _best(said: Said, tokenizer: Tokenizer | None) -> dict[str, float] | None:
    """The most likely tokens and the one that came, the likely ones first."""
    if said.logprob is None or said.top is None:
        return None
    found: dict[str, float] = {}
    for token, value in sorted([*said.top, (said.token, said.logprob)], key=lambda item: -item[1]):
        found.setdefault(_text(token, tokenizer), value)  # parts of characters look alike
    return found


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    return tokenizer.decode([token], skip_special_tokens=False) if tokenizer else str(token)


def _offsets(asked: Request, tokenizer: Tokenizer | None) -> list[int]:
    """For each token of a prompt how many characters of its text stand before it; what was put in front of a text has none."""
    if tokenizer is None:
        return [0] * len(asked.prompt)
    places: list[int] = []
    for skip in (False, True):
        decoder, text, places = StreamDecoder(tokenizer, skip_special_tokens=skip), "", []
        for token in asked.prompt:
            places.append(len(text))
            text += decoder.push(token)
        text += decoder.finish()
        if text.endswith(asked.before):
            return [max(0, place - len(text) + len(asked.before)) for place in places]
    return [min(place, len(asked.before)) for place in places]


def whole(asked: Asked, answers: Sequence[Answer], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The object of an answer that is not streamed."""
    choices = []
    for index, answer in enumerate(answers):
        said: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text.text}} if asked.chat else {
            "text": answer.request.before + answer.text.text}
        choices.append({"index": index, **said, "finish_reason": finish_reason(answer),
                        "logprobs": logprobs(answer, tokenizer, 0, chat=asked.chat)[0]})
    return _envelope(asked, "") | {"choices": choices, "usage": usage(answers, asked.prompts)}


def finish_reason(answer: Answer) -> str | None:
    reason = answer.finish_reason
    return None if reason is None else ENDS.get(reason, reason)


def chunk(asked: Asked, index: int, piece: str | None, *, first: bool, finish: str | None = None,
          probabilities: dict[str, Any] | None = None, echo: str = "") -> dict[str, Any]:
    """The object of a piece of a stream; `piece` None says only how it ended."""
    said: dict[str, Any]
    if asked.chat:
        said = {"delta": ({"role": "assistant"} if first else {}) | ({"content": piece} if piece is not None else {})}
    else:
        said = {"text": (echo if first else "") + (piece or "")}
    choice = {"index": index, **said, "finish_reason": finish, "logprobs": probabilities}
    return _envelope(asked, ".chunk") | {"choices": [choice]} | ({"usage": None} if asked.usage else {})


def last_chunk(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    return _envelope(asked, ".chunk") | {"choices": [], "usage": usage(answers, asked.prompts)}


def _envelope(asked: Asked, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": f"chat.completion{kind}" if asked.chat else "text_completion", "created": asked.created,
            "model": asked.model}
