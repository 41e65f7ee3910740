# SPDX-License-Identifier: Apache-2.0
"""Turns prompts into checked requests. A prompt is a text, token ids or a chat; there may be one or many.
Imports no torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from modellink.data_prep import Tokenizer
from modellink.infer.arguments import (
    GenerationArguments,
    as_list,
    beam_search_of,
    check_arguments,
    note_ignored,
    sampling_of,
)
from modellink.infer.grammar import make_grammar
from modellink.infer.request import GenerationRequest, SequenceTooLong
from modellink.infer.sampling import out_of_range
from modellink.infer.template import Chat, encode_chat_prompt
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    from modellink.ckpt_convert.spec import ModelSpec

Message = Mapping[str, Any]
Prompts = (str | Chat | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message]
           | Sequence[Sequence[Message]] | Sequence[Chat])
DEFAULT_NEW_TOKENS = 128


def make_requests(prompts: Prompts, spec: ModelSpec, tokenizer: Tokenizer | None, /,
                  **arguments: Unpack[GenerationArguments],
                  ) -> list[GenerationRequest]:
    """Return the requests for one prompt or a list of prompts.

    Args:
        prompts: a text, token ids, a chat (messages with role and content, or a `Chat`; a template is applied
            to it), or a list of texts, of token ids or of chats.

    Raises:
        ModelLinkError: an empty or too long prompt, a token id beyond the vocabulary, an argument that
            `check_arguments` refuses, text or chats for a checkpoint without a tokenizer.
    """
    check_arguments(arguments)
    note_ignored(arguments)
    stop_ids, stop_strings = _stops(arguments, spec, tokenizer)
    grammar = make_grammar(tokenizer, json_schema=arguments.get("json_schema"), regex=arguments.get("regex"))
    top = arguments.get("top_logprobs", 0)
    if not 0 <= top <= spec.vocab_size:
        raise out_of_range("top_logprobs", top, f"between 0 and {spec.vocab_size}")
    shared = GenerationRequest(
        (), 0, sampling_of(arguments), stop_ids, stop_strings, top_logprobs=top,
        beams=beam_search_of(arguments), grammar=grammar,
        logprobs=bool(arguments.get("logprobs") or arguments.get("return_output_log_probs") or top),
        detokenize=arguments.get("detokenize", True), prompt_logprobs=bool(arguments.get("prompt_logprobs")))
    return [request for prompt in _list_of(prompts)
            for request in _requests_of(prompt, shared, arguments, spec, tokenizer)]


def _requests_of(prompt: Any, shared: GenerationRequest, arguments: GenerationArguments, spec: ModelSpec,
                 tokenizer: Tokenizer | None) -> list[GenerationRequest]:
    """Return the requests for one prompt: one per sample, or one for all beams."""
    ids, template_stops = _encode(prompt, tokenizer, arguments.get("prompt_type"))
    check_ids(ids, spec)
    if arguments.get("ignore_eos") or arguments.get("eos_token_id") is not None:
        template_stops = ()
    text_prefix = _decode(prompt, ids, tokenizer) if arguments.get("include_input") else ""
    request = replace(shared, prompt=ids, max_new_tokens=_max_new_tokens(len(ids), arguments, spec),
                      stop_ids=shared.stop_ids.union(template_stops), text_prefix=text_prefix)
    if request.beams:
        return [request]
    return [_sample(request, number) for number in range(arguments.get("num_return_sequences", 1))]


def _decode(prompt: Any, ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """Return a prompt as text."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(ids) if tokenizer else ""


def _sample(request: GenerationRequest, number: int) -> GenerationRequest:
    """Return the request for one of several samples, each with the next seed."""
    seed = request.sampling.seed
    if seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + number))


def _stops(arguments: GenerationArguments, spec: ModelSpec, tokenizer: Tokenizer | None,
           ) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the token ids and the strings that end a completion."""
    stops, ends = as_list(arguments.get("stop")), as_list(arguments.get("eos_token_id"))
    strings = tuple(item for item in stops if isinstance(item, str))
    if strings and tokenizer is None:
        raise _no_tokenizer("a stop string")
    check_stop_ids([item for item in stops if isinstance(item, int)], spec, "--stop")
    check_stop_ids(ends, spec, "eos_token_id")
    if arguments.get("ignore_eos"):
        ends = []
    elif arguments.get("eos_token_id") is None and tokenizer is not None:
        ends = list(tokenizer.eos_token_ids)
    return frozenset(item for item in [*stops, *ends] if isinstance(item, int)), strings


def check_stop_ids(ids: Sequence[int], spec: ModelSpec, where: str) -> None:
    """Raise for a token id outside the vocabulary, which could never occur."""
    wrong = next((index for index in ids if not 0 <= index < spec.vocab_size), None)
    if wrong is not None:
        raise ModelLinkError(f"the token id {wrong} is not in the vocabulary, whose ids are 0 to "
                             f"{spec.vocab_size - 1}",
                             where=where)


def check_ids(ids: Sequence[int], spec: ModelSpec, what: str = "the prompt") -> None:
    """Raise if there are no tokens, or one is outside the vocabulary."""
    if not ids:
        raise ModelLinkError(f"{what} has no tokens", fix="give at least one word")
    wrong = next((index for index in ids if not 0 <= index < spec.vocab_size), None)
    if wrong is not None:
        raise ModelLinkError(f"{what} contains the token id {wrong}; the ids of the vocabulary are 0 to "
                             f"{spec.vocab_size - 1}",
                             fix="use the model's own tokenizer")


def _list_of(prompts: Prompts) -> list[Any]:
    """Return one or many prompts as a list; tensors and arrays of one or two dimensions are token ids."""
    prompts = _without_tensors(prompts)
    if not isinstance(prompts, (str, Chat, Sequence)):
        raise _not_a_prompt()
    if isinstance(prompts, (str, Chat)) or (len(prompts) and isinstance(prompts[0], (int, float, Mapping))):
        return [prompts]
    return [_without_tensors(prompt) for prompt in prompts]


def _without_tensors(value: Any) -> Any:
    """Return a tensor, an array or a list of scalar tensors as a list of numbers, anything else unchanged."""
    if hasattr(value, "tolist"):
        value = value.tolist()
        if not isinstance(value, list):
            raise _not_a_prompt()
    if isinstance(value, (list, tuple)) and value and getattr(value[0], "ndim", None) == 0:
        value = [item.item() for item in value]
    return value


def _encode(prompt: Any, tokenizer: Tokenizer | None,
            prompt_type: str | None) -> tuple[list[int], tuple[int, ...]]:
    """Return the token ids of a prompt, and additional ids that end a completion."""
    if not isinstance(prompt, (str, Chat)) and len(prompt) and isinstance(prompt[0], Mapping):
        prompt = Chat(prompt)
    if not isinstance(prompt, (str, Chat)):
        try:
            return [operator.index(index) for index in prompt], ()
        except TypeError:
            raise _not_a_prompt() from None
    if tokenizer is None:
        raise _no_tokenizer("a text or a chat")
    if isinstance(prompt, str):
        check_text(prompt)
        return tokenizer.encode(prompt), ()
    return encode_chat_prompt(tokenizer, prompt, prompt_type)


def check_text(text: str) -> None:
    """Raise for a lone surrogate, which a Python string may hold and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelLinkError(f"the text is not Unicode at character {error.start}: {text[error.start]!a}",
                             fix="write it in UTF-8") from None


def _not_a_prompt() -> ModelLinkError:
    return ModelLinkError("a prompt must be a text, token ids (integers), a chat, or a list of these")


def _no_tokenizer(what: str) -> ModelLinkError:
    return ModelLinkError(f"{what} needs a tokenizer, and the checkpoint has none",
                          where="--tokenizer-name-or-path",
                          fix="set it to the model's Hugging Face folder, which holds its tokenizer.json")


def max_sequence_tokens(spec: ModelSpec) -> int | float:
    """Return the longest sequence of a model in tokens; dynamic rotary scaling has no limit."""
    return math.inf if spec.rope_scaling_type == "dynamic" else spec.max_position_embeddings


def _max_new_tokens(prompt: int, arguments: GenerationArguments, spec: ModelSpec) -> int:
    """Return how many tokens may follow a prompt of that many tokens."""
    wanted, limit = arguments.get("max_new_tokens"), arguments.get("max_length")
    capacity = max_sequence_tokens(spec) - prompt
    least = 0 if arguments.get("prompt_logprobs") else 1
    if capacity < least:
        raise SequenceTooLong(f"the prompt has {prompt} tokens, the model's maximum length is "
                              f"{spec.max_position_embeddings}",
                              fix="shorten the prompt")
    if not wanted and limit is not None:  # in the original, max_new_tokens 0 means that max_length applies
        wanted = limit - prompt
        if wanted < 1:
            raise ModelLinkError(f"the prompt has {prompt} tokens, which leaves none of {limit} for the "
                                 "completion",
                                 where="--max-length")
    if wanted is None:
        return int(min(DEFAULT_NEW_TOKENS, capacity))
    if wanted < least:
        raise out_of_range("max_new_tokens", wanted, f"at least {least}")
    if wanted > capacity:
        raise SequenceTooLong(f"a prompt of {prompt} tokens and {wanted} new tokens exceed the model's "
                              f"maximum length of {spec.max_position_embeddings}", where="--max-new-tokens",
                              fix=f"use at most {capacity}")
    return wanted
