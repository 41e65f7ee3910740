"""What a user gives as a prompt, made into checked requests: text, token ids, chats, one or many of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from modellink.ckpt_convert.spec import ModelSpec
from modellink.data_prep import Tokenizer, encode_chat
from modellink.infer.request import Request
from modellink.infer.sampling import Sampling
from modellink.kernels.errors import ModelLinkError

Message = Mapping[str, Any]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message] | Sequence[Sequence[Message]]
DEFAULT_NEW_TOKENS = 128


class Options(TypedDict, total=False):
    """How `generate` and `stream` answer; what is left out has the default of `make_requests`."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | int | Sequence[str | int]
    ignore_eos: bool
    logprobs: bool


def make_requests(
    prompts: Prompts, spec: ModelSpec, tokenizer: Tokenizer | None, *, max_new_tokens: int | None = None,
    do_sample: bool | None = None, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
    seed: int | None = None, stop: str | int | Sequence[str | int] = (), ignore_eos: bool = False, logprobs: bool = False,
) -> list[Request]:
    """Requests of one prompt or a list of them.

    Args:
        prompts: a text, token ids, a chat (messages with role and content, which go through the tokenizer's chat template), or
            a list of texts, of token ids, of chats.
        max_new_tokens: None stands for 128, or less where the model's longest sequence leaves less room.
        do_sample: draw tokens; False takes the most likely one, None draws when temperature, top_k or top_p is given.
        temperature, top_k, top_p: see `Sampling`; None stands for 1.0, 50, 1.0.
        seed: of each request, whatever else is in the batch.
        stop: strings or token ids that end an answer, beside the end tokens of the checkpoint.
        ignore_eos: the end tokens of the checkpoint end nothing.
        logprobs: give the log-probability of each token.

    Raises:
        ModelLinkError: an empty or too long prompt, a token id beyond the vocabulary, a number out of range, text or chats
            where the checkpoint has no tokenizer.
    """
    if do_sample is None:
        do_sample = any(value is not None for value in (temperature, top_k, top_p))
    sampling = Sampling(do_sample, 1.0 if temperature is None else temperature, 50 if top_k is None else top_k,
                        1.0 if top_p is None else top_p, seed)
    stops = [stop] if isinstance(stop, (str, int)) else list(stop)
    strings = tuple(item for item in stops if isinstance(item, str))
    if "" in strings:
        raise ModelLinkError("a stop string is empty", where="--stop")
    if strings and tokenizer is None:
        raise _no_tokenizer("a stop string")
    ends = () if ignore_eos or tokenizer is None else tokenizer.eos_token_ids
    stop_ids = frozenset(item for item in stops if isinstance(item, int)) | frozenset(ends)
    requests = []
    for prompt in _each(prompts):
        ids = _ids(prompt, tokenizer)
        check_ids(ids, spec)
        requests.append(Request(ids, _room(len(ids), max_new_tokens, spec), sampling, stop_ids, strings, logprobs))
    return requests


def check_ids(ids: Sequence[int], spec: ModelSpec, what: str = "the prompt") -> None:
    """Raise where there is no token, or one that the model does not know."""
    if not ids:
        raise ModelLinkError(f"{what} has no tokens", fix="give at least one word")
    wrong = next((index for index in ids if not 0 <= index < spec.vocab_size), None)
    if wrong is not None:
        raise ModelLinkError(f"{what} holds the token id {wrong}; the model knows ids from 0 to {spec.vocab_size - 1}",
                             fix="use the tokenizer that belongs to the model")


def _each(prompts: Prompts) -> list[Any]:
    """A list of prompts, however many there are."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (int, Mapping))):
        return [prompts]
    return list(prompts)


def _ids(prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str) and not (len(prompt) and isinstance(prompt[0], Mapping)):
        return [int(index) for index in prompt]
    if tokenizer is None:
        raise _no_tokenizer("a text or a chat")
    return tokenizer.encode(prompt) if isinstance(prompt, str) else encode_chat(tokenizer, prompt, add_generation_prompt=True)


def _no_tokenizer(what: str) -> ModelLinkError:
    return ModelLinkError(f"{what} needs a tokenizer, and the checkpoint carries none", where="--tokenizer-name-or-path",
                          fix="give the Hugging Face folder of the model with its tokenizer.json")


def _room(prompt: int, max_new_tokens: int | None, spec: ModelSpec) -> int:
    """How many tokens may come after a prompt of that many."""
    room = spec.max_position_embeddings - prompt
    if room < 1:
        raise ModelLinkError(f"the prompt has {prompt} tokens; the model's longest sequence is {spec.max_position_embeddings}",
                             fix="shorten the prompt")
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens < 1:
        raise ModelLinkError(f"max-new-tokens is {max_new_tokens}, it must be at least 1", where="--max-new-tokens")
    if max_new_tokens > room:
        raise ModelLinkError(f"the prompt has {prompt} tokens, with {max_new_tokens} new ones it outgrows the model's longest "
                             f"sequence of {spec.max_position_embeddings}", where="--max-new-tokens", fix=f"use at most {room}")
    return max_new_tokens
