"""What a body of OpenAI's API asks for, and the objects that answer it. Plain dicts in and out; nothing here waits or computes.

Not here: logit_bias, suffix, best_of and beams, which are refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec
from modellink.data_prep import StreamDecoder, Tokenizer
from modellink.infer.prompts import Options, check_text, longest, make_requests
from modellink.infer.request import Answer, Request
from modellink.infer.template import Chat
from modellink.kernels.errors import ModelLinkError

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
WHOLE = ("seed", "top_k")
# Fields of the API, and of other servers, that would change the answer and are not there.
UNKNOWN = ("logit_bias", "suffix", "best_of", "use_beam_search", "num_beams", "length_penalty", "early_stopping")
MOST_ANSWERS = 128  # of one request
MOST_STOPS = 64
OURS = ("tokenizer", "messages", "tools", "documents", "add_generation_prompt", "template", "mark", "source", "where")
Row = tuple[int, float | None, Sequence[tuple[int, float]] | None, int]
"""A token, its log-probability, the most likely ones in its place, and the characters before it."""


@dataclass(frozen=True)
class Asked:
    """A body, read."""

    requests: list[Request]
    chat: bool
    stream: bool
    usage: bool  # an additional chunk at the end of a stream says how many tokens there were
    model: str
    id: str
    prompts: int
    created: int


def read_body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ModelLinkError(f"the body is not JSON: {error or 'it is nested too deeply'}") from None
    if not isinstance(body, dict):
        raise ModelLinkError("the body is not a JSON object")
    if b"\\u" in content:  # the only way to write half a character
        check_text(json.dumps(body, ensure_ascii=False))
    return body


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def field(body: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    """A field of the body, null standing for its absence.

    Raises:
        ModelLinkError: it is of another kind.
    """
    value = body.get(name)
    if value is None:
        return default
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ModelLinkError(f"{name} is {json.dumps(value)[:50]}, it must be of type {' or '.join(k.__name__ for k in allowed)}",
                             where=name)
    return value


def read_asked(body: Mapping[str, Any], *, chat: bool, spec: ModelSpec, tokenizer: Tokenizer | None, model: str,
               most: int, prompt_type: str | None = None) -> Asked:
    """What a body asks for, checked; there is room for sequences of `most` tokens, `prompt_type` is the template of chats.

    Raises:
        ModelLinkError: something in it is wrong; the message names the field.
    """
    for name in UNKNOWN:
        value = body.get(name)
        if value is True or value not in (None, {}, 1, "", False):
            raise ModelLinkError(f"{name} is not supported", where=name, fix="leave it out")
    options = _options(body, chat)
    if chat and options["max_new_tokens"] is None:
        options["max_length"] = int(min(longest(spec), most))
    count = field(body, "n", int, 1)
    prompts: list[Any] = _chat(body, tokenizer) if chat else _prompts(body)
    if not 1 <= count * len(prompts) <= MOST_ANSWERS:
        raise ModelLinkError(f"{count} answers to {len(prompts)} prompts were asked for, {MOST_ANSWERS} is the most", where="n")
    options |= {"num_return_sequences": count, "prompt_type": prompt_type}
    requests = make_requests(prompts, spec, tokenizer, **options)
    streaming = field(body, "stream", bool, False)
    usage = field(field(body, "stream_options", dict, {}), "include_usage", bool, False)
    return Asked(requests, chat, streaming, usage and streaming, model, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
                 len(prompts), int(time.time()))


def _options(body: Mapping[str, Any], chat: bool) -> Options:
    """Of `make_requests`; the API draws from all tokens at temperature 1 unless it is told otherwise."""
    drawn: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "do_sample": True}
    drawn |= {name: _float(value, name) for name in NUMBERS if (value := field(body, name, (int, float))) is not None}
    drawn |= {name: value for name in WHOLE if (value := field(body, name, int)) is not None}
    if drawn["top_k"] == -1:  # what other servers write for all tokens
        drawn["top_k"] = 0
    stop = field(body, "stop", (str, list), [])
    stops = [*([stop] if isinstance(stop, str) else stop), *field(body, "stop_token_ids", list, [])]
    if not all(isinstance(item, (str, int)) and not isinstance(item, bool) for item in stops):
        raise ModelLinkError("stop holds something that is no text", where="stop")
    if len(stops) > MOST_STOPS:
        raise ModelLinkError(f"{len(stops)} stops were asked for, {MOST_STOPS} is the most", where="stop")
    tokens = field(body, "max_completion_tokens", int) if chat else None
    tokens = field(body, "max_tokens", int, None if chat else 16) if tokens is None else tokens
    logprobs = field(body, "logprobs", bool if chat else (int, bool), False)
    top = field(body, "top_logprobs", int, 0) if chat else int(logprobs)
    wanted = logprobs if chat else logprobs is not False
    if top and not wanted:
        raise ModelLinkError("top_logprobs needs logprobs", where="top_logprobs", fix="set logprobs to true")
    echo = not chat and field(body, "echo", bool, False)
    if not 0 <= top <= 20:
        raise ModelLinkError(f"{top} alternatives were asked for, 20 is the most", where="top_logprobs")
    found: Options = {**drawn, **_format(body), "stop": stops, "ignore_eos": field(body, "ignore_eos", bool, False),  # type: ignore[typeddict-item]
                      "logprobs": wanted, "top_logprobs": top, "max_new_tokens": tokens, "include_input": echo,
                      "prompt_logprobs": echo and (wanted or tokens == 0)}
    return found


def _float(value: int | float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ModelLinkError(f"{name} has {len(str(value))} digits", where=name) from None


def _format(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer keeps to: `response_format` of the API, and its type `regex`."""
    wanted = field(body, "response_format", dict, {})
    kind = field(wanted, "type", str, "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema":
        named = field(wanted, "json_schema", dict, {})
        return {"json_schema": field(named, "schema", dict, {})}
    if kind == "regex" and (expression := field(wanted, "regex", str)):
        return {"regex": expression}
    raise ModelLinkError("response_format is none of text, json_object, json_schema and regex (with the expression as regex)",
                         where="response_format")


def _prompts(body: Mapping[str, Any]) -> list[Any]:
    """Texts or lists of token ids."""
    prompt = field(body, "prompt", (str, list))
    if prompt is None or prompt == []:
        raise ModelLinkError("there is no prompt", where="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if all(_is_id(item) for item in prompt):
        return [prompt]
    if all(isinstance(item, str) or (isinstance(item, list) and item and all(map(_is_id, item))) for item in prompt):
        return list(prompt)
    raise ModelLinkError("a prompt is a text, a list of token ids, or a list of these", where="prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _chat(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[Chat]:
    """The messages with their tools."""
    messages, tools = field(body, "messages", list), field(body, "tools", list)
    if not messages:
        raise ModelLinkError("there are no messages", where="messages")
    if tokenizer is None:
        raise ModelLinkError("the checkpoint carries no tokenizer, so there is no chat template", where="messages")
    plain = [_message(message, number) for number, message in enumerate(messages)]
    extra = field(body, "chat_template_kwargs", dict, {})
    if ours := [name for name in extra if name in OURS]:
        raise ModelLinkError(f"chat_template_kwargs holds {ours[0]}, which the server says itself", where="chat_template_kwargs")
    return [Chat(plain, tools, extra)]


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ModelLinkError(f"message {number} is no object with a role", where="messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ModelLinkError(f"message {number} holds a part that is no text", where="messages")
        content = "".join(map(str, parts))
    if content is not None and not isinstance(content, str):
        raise ModelLinkError(f"the content of message {number} is no text", where="messages")
    return {**message, "content": content or ""}


def usage(answers: Sequence[Answer], prompts: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of all answers."""
    each = max(1, len(answers) // prompts)
    asked, made = sum(len(answer.request.prompt) for answer in answers[::each]), sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def logprobs(answer: Answer, tokenizer: Tokenizer | None, start: int, *, chat: bool) -> tuple[dict[str, Any] | None, int]:
    """Those of the tokens from `start`, as the API writes them, and where the next ones start; an echoed prompt counts too."""
    asked = answer.request
    if not asked.logprobs:
        return None, start
    rows: list[Row] = []
    told = len(asked.prompt) if asked.prompt_logprobs else 0
    if start < told:
        offsets = _offsets(asked, tokenizer)
        rows += zip(asked.prompt, [None, *answer.prompt_logprobs], [None, *answer.prompt_top_logprobs], offsets, strict=True)
    first = max(0, start - told)
    said = zip(answer.token_ids[first:], answer.logprobs[first:], answer.top_logprobs[first:], answer.offsets[first:],
               strict=False)  # the answer may be growing
    rows += [(token, value, top, len(asked.before) + offset) for token, value, top, offset in said]

    def text(token: int) -> str:
        return tokenizer.decode([token], skip_special_tokens=False) if tokenizer else str(token)

    def entry(token: int, value: float | None) -> dict[str, Any]:
        written = text(token)
        return {"token": written, "logprob": value, "bytes": None if "\ufffd" in written else list(written.encode())}

    def best(token: int, value: float | None, top: Sequence[tuple[int, float]] | None) -> dict[str, float] | None:
        if value is None or top is None:
            return None
        found: dict[str, float] = {}
        for other, likely in sorted([*top, (token, value)], key=lambda item: -item[1]):
            found.setdefault(text(other), likely)  # parts of characters look alike
        return found
    if chat:
        content = [entry(token, value) | {"top_logprobs": [entry(*item) for item in top or ()]} for token, value, top, _ in rows]
        return {"content": content}, start + len(rows)
    return {"tokens": [text(token) for token, *_ in rows], "token_logprobs": [value for _, value, *_ in rows],
            "top_logprobs": [best(token, value, top) for token, value, top, _ in rows],
            "text_offset": [offset for *_, offset in rows]}, start + len(rows)


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
    return [min(place, len(asked.before)) for place in places] or [0] * len(asked.prompt)


def whole(asked: Asked, answers: Sequence[Answer], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The object of an answer that is not streamed."""
    choices = []
    for index, answer in enumerate(answers):
        said: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text.text}} if asked.chat else {
            "text": answer.request.before + answer.text.text}
        choices.append({"index": index, **said, "finish_reason": answer.finish_reason,
                        "logprobs": logprobs(answer, tokenizer, 0, chat=asked.chat)[0]})
    return _envelope(asked, "") | {"choices": choices, "usage": usage(answers, asked.prompts)}


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


def error(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
