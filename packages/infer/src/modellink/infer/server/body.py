"""What a body of OpenAI's API asks for, checked field by field. Plain dicts in, requests out; nothing here waits or computes.

What an error is about is said in the API's words, with the name of the field. Not here: messages and tools (messages.py), and
fields that would change the answer and are not there (`NEUTRAL`), which are refused by name.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec
from modellink.data_prep import Tokenizer
from modellink.infer.prompts import Options, check_stop_ids, check_text, longest, make_requests
from modellink.infer.request import Request
from modellink.infer.server.fields import field
from modellink.infer.server.messages import read_chat
from modellink.kernels.errors import ModelLinkError

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
WHOLE = ("seed", "top_k")
MOST_ANSWERS = 128  # of one request
MOST_STOPS = 64
MOST_ALTERNATIVES = 20
# Fields of the API, and of other servers, that would change the answer and are not there; each with what asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "audio": (), "bad_words": ([],), "best_of": (1,), "chat_template": ("",),
    "continue_final_message": (False,), "documents": ([],), "early_stopping": (False,), "function_call": ("none",),
    "functions": ([],), "guided_choice": ([],), "guided_grammar": ("",), "include_stop_str_in_output": (False,),
    "length_penalty": (1,), "logit_bias": ({},), "logits_processors": ([],), "max_new_tokens": (), "min_tokens": (0,),
    "modalities": (["text"],), "num_beams": (1,), "parallel_tool_calls": (True,), "prediction": (), "prompt_logprobs": (),
    "reasoning_effort": (), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "structural_tag": (), "suffix": ("",), "truncate_prompt_tokens": (), "typical_p": (1,), "use_beam_search": (False,),
    "verbosity": ("medium",), "web_search_options": ()}
OF_CHATS = {"add_generation_prompt": (True,), "add_special_tokens": (False,), "echo": (False,), "prompt": ()}
OF_TEXTS = {"add_special_tokens": (True,), "messages": (), "tools": ([],), "tool_choice": ("none",), "top_logprobs": ()}
FLAGS = {"max-length": "max_tokens", "num-return-sequences": "n", "json-schema": "response_format", "regex": "response_format",
         "cache-tokens": "max_tokens"}
"""What options of the library are called here, where it is not their own name with `_`."""


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


def read_asked(body: Mapping[str, Any], *, chat: bool, spec: ModelSpec, tokenizer: Tokenizer | None, model: str,
               most: int, prompt_type: str | None = None, most_answers: int = MOST_ANSWERS) -> Asked:
    """What a body asks for, checked; there is room for sequences of `most` tokens, `prompt_type` is the template of chats.
    `most_answers` may be under way at all: who asks for more would wait for ever.

    Raises:
        ModelLinkError: something in it is wrong; `where` is the field.
    """
    for name, nothing in (NEUTRAL | (OF_CHATS if chat else OF_TEXTS)).items():
        value = body.get(name)
        if value is not None and not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in nothing):
            raise ModelLinkError(f"{name} is not supported", where=name, fix="leave it out")
    options: Options = {**_drawing(body), **_ends(body, spec), **_form(body), **_told(body, chat)}  # type: ignore[typeddict-item]
    if chat and options["max_new_tokens"] is None:
        options["max_length"] = int(min(longest(spec), most))
    count = field(body, "n", int, 1)
    prompts: list[Any] = [read_chat(body, tokenizer)] if chat else _prompts(body)
    most_answers = min(most_answers, MOST_ANSWERS)
    if not 1 <= count * len(prompts) <= most_answers:
        raise ModelLinkError(f"{count} answers to {len(prompts)} prompts were asked for, {most_answers} is the most", where="n")
    options |= {"num_return_sequences": count, "prompt_type": prompt_type}
    try:
        requests = make_requests(prompts, spec, tokenizer, **options)
    except ModelLinkError as error:
        raise in_api_words(error, body, chat=chat) from None
    streaming = field(body, "stream", bool, False)
    usage = field(field(body, "stream_options", dict, {}), "include_usage", bool, False)
    return Asked(requests, chat, streaming, usage and streaming, model, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
                 len(prompts), int(time.time()))


def in_api_words(error: ModelLinkError, body: Mapping[str, Any], *, chat: bool) -> ModelLinkError:
    """An error of the library, which names flags and options, as one about a field of the body."""
    tokens = "max_completion_tokens" if chat and body.get("max_completion_tokens") is not None else "max_tokens"
    names = FLAGS | {"max-new-tokens": tokens, "top-logprobs": "top_logprobs" if chat else "logprobs"}

    def field_of(flag: str) -> str:
        return names.get(flag, flag.replace("-", "_"))

    def rename(found: re.Match[str]) -> str:
        known = found[1] in FLAGS or found[1].replace("-", "_") in Options.__annotations__
        return field_of(found[1]) if known else found[0]
    what, fix = (text and re.sub(r"(?<![\w-])(?:--)?([a-z]+(?:-[a-z]+)+)(?![\w-])", rename, text)
                 for text in (error.what, error.fix))
    prompt, flag = "messages" if chat else "prompt", str(error.where).split(", ")[0]
    if flag.startswith("--") and flag != "--tokenizer-name-or-path":
        where = field_of(flag.removeprefix("--"))
    else:  # of the prompt, or a place in its template
        where = flag if flag in body else prompt
    return ModelLinkError(str(what), where=where, fix=fix)


def _drawing(body: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are drawn: from all of them at temperature 1, unless the body says otherwise."""
    found: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "do_sample": True}
    for name in NUMBERS:
        if (value := field(body, name, (int, float))) is not None:
            found[name] = _float(value, name)
    for name in WHOLE:
        if (value := field(body, name, int)) is not None:
            found[name] = value
    if found["top_k"] == -1:  # what other servers write for all tokens
        found["top_k"] = 0
    return found


def _float(value: int | float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ModelLinkError(f"{name} has {len(str(value))} digits", where=name) from None


def _ends(body: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """What ends an answer."""
    stop, ids = field(body, "stop", (str, list), []), field(body, "stop_token_ids", list, [])
    stops = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(item, str) for item in stops):
        raise ModelLinkError("stop holds something that is no text", where="stop")
    if not all(map(_is_id, ids)):
        raise ModelLinkError("stop_token_ids holds something that is no token id", where="stop_token_ids")
    check_stop_ids(ids, spec, "stop_token_ids")
    if len(stops) + len(ids) > MOST_STOPS:
        raise ModelLinkError(f"{len(stops) + len(ids)} stops were asked for, {MOST_STOPS} is the most", where="stop")
    return {"stop": [*stops, *ids], "ignore_eos": field(body, "ignore_eos", bool, False)}


def _told(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """How long an answer may be, and what is told about its tokens and the prompt's."""
    if chat:
        tokens = field(body, "max_completion_tokens", int)
        tokens = field(body, "max_tokens", int) if tokens is None else tokens
        wanted, top = field(body, "logprobs", bool, False), field(body, "top_logprobs", int, 0)
        if top and not wanted:
            raise ModelLinkError("top_logprobs needs logprobs", where="top_logprobs", fix="set logprobs to true")
        echo = False
    else:
        tokens = field(body, "max_tokens", int, 16)
        logprobs = field(body, "logprobs", (int, bool), False)  # how many alternatives; 0 is the tokens' own alone
        wanted, top = logprobs is not False, int(logprobs)
        echo = field(body, "echo", bool, False)
    if not 0 <= top <= MOST_ALTERNATIVES:
        raise ModelLinkError(f"{top} alternatives were asked for, {MOST_ALTERNATIVES} is the most",
                             where="top_logprobs" if chat else "logprobs")
    return {"max_new_tokens": tokens, "logprobs": wanted, "top_logprobs": top, "include_input": echo,
            "prompt_logprobs": echo and (wanted or tokens == 0)}


def _form(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer keeps to: `response_format` of the API, its type `regex`, or the fields of other servers."""
    found = _response_format(body)
    others = {"json_schema": field(body, "guided_json", (dict, str)), "regex": field(body, "guided_regex", str)}
    structured = field(body, "structured_outputs", dict, {})
    if unknown := next((name for name in structured if name not in ("json", "regex") and structured[name] is not None), None):
        raise ModelLinkError(f"{unknown} in structured_outputs is not supported", where="structured_outputs",
                             fix="use json or regex")
    for name, theirs in (("json_schema", "json"), ("regex", "regex")):
        value = field(structured, theirs, (dict, str) if theirs == "json" else str)
        others[name] = value if others[name] is None else others[name]
    for name, value in others.items():
        if value is not None:
            if found:
                raise ModelLinkError("an answer keeps to one schema or expression", where="response_format",
                                     fix="give one of response_format, guided_json, guided_regex and structured_outputs")
            found = {name: value}
    return found


def _response_format(body: Mapping[str, Any]) -> dict[str, Any]:
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
