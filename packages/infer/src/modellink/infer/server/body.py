# SPDX-License-Identifier: Apache-2.0
"""Reads and checks the body of a request of OpenAI's API, field by field. Plain dicts in, requests out;
nothing here computes.

Errors name the field. Not here: messages and tools (messages.py). Fields that would change the result and are
not supported (`UNSUPPORTED`) are refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from modellink.data_prep import Tokenizer
from modellink.infer.arguments import GenerationArguments
from modellink.infer.prompts import check_stop_ids, check_text, make_requests, max_sequence_tokens
from modellink.infer.request import GenerationRequest
from modellink.infer.server.fields import field
from modellink.infer.server.messages import read_chat
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    from modellink.ckpt_convert.spec import ModelSpec

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("seed", "top_k")
MAX_COMPLETIONS = 128  # of one request
MAX_STOPS = 64
MAX_ALTERNATIVES = 20
# Fields of the API and of other servers that would change the result and are not supported, with the values
# that have no effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "audio": (), "bad_words": ([],), "best_of": (1,), "chat_template": ("",),
    "continue_final_message": (False,), "documents": ([],), "early_stopping": (False,),
    "function_call": ("none",), "functions": ([],), "guided_choice": ([],), "guided_grammar": ("",),
    "include_stop_str_in_output": (False,), "length_penalty": (1,), "logit_bias": ({},),
    "logits_processors": ([],), "max_new_tokens": (), "min_tokens": (0,), "modalities": (["text"],),
    "num_beams": (1,), "parallel_tool_calls": (True,), "prediction": (), "prompt_logprobs": (),
    "reasoning_effort": (), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "structural_tag": (), "suffix": ("",), "truncate_prompt_tokens": (), "typical_p": (1,),
    "use_beam_search": (False,), "verbosity": ("medium",), "web_search_options": ()}
UNSUPPORTED_IN_CHATS = {"add_generation_prompt": (True,), "add_special_tokens": (False,), "echo": (False,),
                        "prompt": ()}
UNSUPPORTED_IN_TEXTS = {"add_special_tokens": (True,), "messages": (), "tools": ([],),
                        "tool_choice": ("none",), "top_logprobs": ()}
FIELDS = {"max_length": "max_tokens", "cache_tokens": "max_tokens", "num_return_sequences": "n",
          "json_schema": "response_format", "regex": "response_format"}
"""Fields of options of the library that have another name here."""


@dataclass(frozen=True)
class CompletionCall:
    """A request body, parsed.

    Attributes:
        requests: one per completion.
        usage: whether the stream ends with a chunk about the token counts.
        prompts: number of prompts.
    """

    requests: list[GenerationRequest]
    chat: bool
    stream: bool
    usage: bool
    model: str
    id: str
    prompts: int
    created: int


def read_body(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ModelLinkError: it is not a JSON object, or contains a lone surrogate.
    """
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelLinkError(f"the body is not JSON: {error or 'it is nested too deeply'}") from None
    if not isinstance(body, dict):
        raise ModelLinkError("the body is not a JSON object")
    if b"\\u" in content:  # the only way to write a lone surrogate
        check_text(json.dumps(body, ensure_ascii=False))
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def parse_call(body: Mapping[str, Any], *, chat: bool, spec: ModelSpec, tokenizer: Tokenizer | None,
               model: str, max_tokens: int, prompt_type: str | None = None,
               max_completions: int = MAX_COMPLETIONS) -> CompletionCall:
    """Return what a body asks for, checked.

    Args:
        max_tokens: the longest sequence that fits into the cache.
        prompt_type: the template for chats.
        max_completions: the most completions that may run or wait; a request for more could never start.

    Raises:
        ModelLinkError: something in the body is wrong; `where` is the field.
    """
    _refuse_unsupported(body, chat)
    found = {**_sampling(body), **_stops(body, spec), **_constraint(body), **_lengths(body, chat)}
    arguments = cast(GenerationArguments, found)
    if chat and arguments["max_new_tokens"] is None:
        arguments["max_length"] = int(min(max_sequence_tokens(spec), max_tokens))
    count = field(body, "n", int, 1)
    prompts: list[Any] = [read_chat(body, tokenizer)] if chat else _prompts(body)
    max_completions = min(max_completions, MAX_COMPLETIONS)
    if not 1 <= count * len(prompts) <= max_completions:
        raise ModelLinkError(f"n is {count} for {len(prompts)} prompts, a request may have 1 to "
                             f"{max_completions} completions",
                             where="n")
    arguments |= {"num_return_sequences": count, "prompt_type": prompt_type}
    try:
        requests = make_requests(prompts, spec, tokenizer, **arguments)
    except ModelLinkError as error:
        raise name_field(error, body, chat=chat) from None
    stream = field(body, "stream", bool, False)
    usage = field(field(body, "stream_options", dict, {}), "include_usage", bool, False)
    return CompletionCall(requests, chat, stream, usage and stream, model,
                          f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", len(prompts),
                          int(time.time()))


def _refuse_unsupported(body: Mapping[str, Any], chat: bool) -> None:
    for name, neutral in (UNSUPPORTED | (UNSUPPORTED_IN_CHATS if chat else UNSUPPORTED_IN_TEXTS)).items():
        value = body.get(name)
        if value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool)
                                for each in neutral):
            continue
        raise ModelLinkError(f"{name} is not supported", where=name, fix="remove it")


def name_field(error: ModelLinkError, body: Mapping[str, Any], *, chat: bool) -> ModelLinkError:
    """Return an error of the library, which is about an option or the prompt, as one about a field of the
    body."""
    where, what = str(error.where), error.what
    if error.option is not None and error.option != "tokenizer_name_or_path":
        where = _field_of(error.option, body, chat)
        what = f"{where}: {what}"
    elif where not in body:  # about the prompt, or a place in its template
        where = "messages" if chat else "prompt"
    return ModelLinkError(what, where=where, fix=error.fix)


def _field_of(option: str, body: Mapping[str, Any], chat: bool) -> str:
    """Return the field of the body that sets an option of the library."""
    if option == "top_logprobs":
        return "top_logprobs" if chat else "logprobs"
    name = "max_tokens" if option == "max_new_tokens" else FIELDS.get(option, option)
    if name == "max_tokens" and chat and body.get("max_completion_tokens") is not None:
        return "max_completion_tokens"
    return name


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling arguments. Default: sample from all tokens at temperature 1."""
    found: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "do_sample": True}
    for name in NUMBERS:
        if (value := field(body, name, (int, float))) is not None:
            found[name] = _float(value, name)
    for name in INTEGERS:
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


def _stops(body: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return what ends a completion."""
    stop, ids = field(body, "stop", (str, list), []), field(body, "stop_token_ids", list, [])
    stops = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(item, str) for item in stops):
        raise ModelLinkError("stop contains something that is not a string", where="stop")
    if not all(map(_is_token_id, ids)):
        raise ModelLinkError("stop_token_ids contains something that is not a token id",
                             where="stop_token_ids")
    check_stop_ids(ids, spec, "stop_token_ids")
    if len(stops) + len(ids) > MAX_STOPS:
        raise ModelLinkError(f"there are {len(stops) + len(ids)} stops, at most {MAX_STOPS} are allowed",
                             where="stop")
    return {"stop": [*stops, *ids], "ignore_eos": field(body, "ignore_eos", bool, False)}


def _lengths(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Return the maximum length, and which log-probabilities to report."""
    if chat:
        tokens = field(body, "max_completion_tokens", int)
        tokens = field(body, "max_tokens", int) if tokens is None else tokens
        wanted, top = field(body, "logprobs", bool, False), field(body, "top_logprobs", int, 0)
        if top and not wanted:
            raise ModelLinkError("top_logprobs needs logprobs", where="top_logprobs",
                                 fix="set logprobs to true")
        echo = False
    else:
        tokens = field(body, "max_tokens", int, 16)
        # number of alternatives; 0: only those of the tokens
        logprobs = field(body, "logprobs", (int, bool), False)
        wanted, top = logprobs is not False, int(logprobs)
        echo = field(body, "echo", bool, False)
    if not 0 <= top <= MAX_ALTERNATIVES:
        name = "top_logprobs" if chat else "logprobs"
        raise ModelLinkError(f"{name} is {top}, it must be between 0 and {MAX_ALTERNATIVES}", where=name)
    return {"max_new_tokens": tokens, "logprobs": wanted, "top_logprobs": top, "include_input": echo,
            "prompt_logprobs": echo and (wanted or tokens == 0)}


def _constraint(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the completion must match: `response_format` of the API, its type `regex`, or the fields of
    other servers."""
    found = _response_format(body)
    others = {"json_schema": field(body, "guided_json", (dict, str)),
              "regex": field(body, "guided_regex", str)}
    structured = field(body, "structured_outputs", dict, {})
    if unknown := next((name for name in structured if name not in ("json", "regex")
                        and structured[name] is not None), None):
        raise ModelLinkError(f"{unknown} in structured_outputs is not supported", where="structured_outputs",
                             fix="use json or regex")
    if others["json_schema"] is None:
        others["json_schema"] = field(structured, "json", (dict, str))
    if others["regex"] is None:
        others["regex"] = field(structured, "regex", str)
    for name, value in others.items():
        if value is not None:
            if found:
                raise ModelLinkError("a completion can match only one schema or expression",
                                     where="response_format",
                                     fix="use one of response_format, guided_json, guided_regex and "
                                         "structured_outputs")
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
    raise ModelLinkError("response_format must have the type text, json_object, json_schema or regex (with "
                         "the field regex)",
                         where="response_format")


def _prompts(body: Mapping[str, Any]) -> list[Any]:
    """Return texts or lists of token ids."""
    prompt = field(body, "prompt", (str, list))
    if prompt is None or prompt == []:
        raise ModelLinkError("there is no prompt", where="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if all(_is_token_id(item) for item in prompt):
        return [prompt]
    if all(isinstance(item, str) or (isinstance(item, list) and item and all(map(_is_token_id, item)))
           for item in prompt):
        return list(prompt)
    raise ModelLinkError("a prompt must be a string, a list of token ids, or a list of these", where="prompt")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
