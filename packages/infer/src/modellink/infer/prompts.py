"""What a user gives as a prompt, made into checked requests: text, token ids, chats, one or many of each."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack

from modellink.ckpt_convert.spec import ModelSpec
from modellink.data_prep import Tokenizer
from modellink.infer.constraint import grammar_of
from modellink.infer.request import Beams, NoRoom, Request
from modellink.infer.sampling import Sampling
from modellink.infer.template import Chat, encode_prompt
from modellink.kernels.errors import ModelLinkError

Message = Mapping[str, Any]
Prompts = (str | Chat | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message] | Sequence[Sequence[Message]]
           | Sequence[Chat])
DEFAULT_NEW_TOKENS = 128


class Options(TypedDict, total=False):
    """How `generate` and `stream` answer. What is left out has the default in brackets.

    - `max_new_tokens` (128, or what fits), `max_length`: longest answer, or prompt and answer together.
    - `do_sample`: draw tokens; by itself when temperature, top_k, top_p or min_p is given.
    - `temperature` (1.0), `top_k` (50), `top_p` (1.0), `min_p` (0), `repetition_penalty` (1), `presence_penalty` (0),
      `frequency_penalty` (0): see `Sampling`.
    - `seed`: of each request, whatever else is in the batch; of several answers to one prompt each has the next number.
    - `num_beams` (1), `length_penalty` (1.0), `early_stopping` (False, True or "never"): beam search; see beam.py.
    - `num_return_sequences` (1): answers to each prompt: the best beams, or so many draws.
    - `stop`: strings or token ids that end an answer, beside the end tokens of the checkpoint, in whose place `eos_token_id`
      stands where it is given; `ignore_eos` (False): the end tokens end nothing.
    - `logprobs` (False): give the log-probability of each token; `top_logprobs` (0): and of the most likely ones in its place.
      `return_output_log_probs` is another name of `logprobs`. `prompt_logprobs` (False): and of the prompt's tokens; then
      `max_new_tokens` may be 0.
    - `include_input` (False): the text begins with the prompt. `detokenize` (True): make text of the tokens.
    - `json_schema`, `regex`: what the answer keeps to, see constraint.py; a schema is an object or JSON text.
    - `prompt_type`: the template around a chat, see template.py (the one `load` was given, else the one the checkpoint was
      trained with, else the tokenizer's own).

    Names of the original's API that mean nothing here (`MEANINGLESS`) are taken with a note.
    """

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int
    stop: str | int | Sequence[str | int]
    eos_token_id: int | Sequence[int] | None
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    return_output_log_probs: bool
    prompt_logprobs: bool
    include_input: bool
    detokenize: bool
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    prompt_type: str | None
    bos_token_id: int | None
    pad_token_id: int | None
    recompute: bool | None
    tokenizer: Any


MEANINGLESS = {"bos_token_id": "the tokenizer says what a text begins with", "pad_token_id": "rows are not padded",
               "recompute": "keys and values are always kept", "tokenizer": "the engine has the one it was loaded with"}
_noted: set[str] = set()


def make_requests(prompts: Prompts, spec: ModelSpec, tokenizer: Tokenizer | None, /, **options: Unpack[Options]) -> list[Request]:
    """Requests of one prompt or a list of them.

    Args:
        prompts: a text, token ids, a chat (messages with role and content, or a `Chat`, which go through a template), or a
            list of texts, of token ids, of chats.

    Raises:
        ModelLinkError: an empty or too long prompt, a token id beyond the vocabulary, a number out of range, an unknown option,
            text or chats where the checkpoint has no tokenizer.
    """
    unknown = next((name for name in options if name not in Options.__annotations__), None)
    if unknown:
        raise ModelLinkError(f"there is no option {unknown}", where="generate",
                             fix=f"there are {', '.join(Options.__annotations__)}")
    for name in MEANINGLESS.keys() - _noted:
        if options.get(name) is not None:
            _noted.add(name)
            print(f"note: {name} means nothing here: {MEANINGLESS[name]}", file=sys.stderr)
    sampling, (stop_ids, strings) = _sampling(options), _stops(options, spec, tokenizer)
    beams, count = _beams(options), options.get("num_return_sequences", 1)
    grammar = grammar_of(tokenizer, json_schema=options.get("json_schema"), regex=options.get("regex"))
    if options.get("prompt_logprobs") and beams:
        raise ModelLinkError("beams give no log-probabilities of the prompt", where="--num-beams", fix="leave one of them out")
    if grammar and beams:
        raise ModelLinkError("beams do not keep to a schema or an expression", where="--num-beams", fix="leave one of them out")
    top = options.get("top_logprobs", 0)
    if not 0 <= top <= spec.vocab_size:
        raise ModelLinkError(f"top-logprobs is {top}, it must be between 0 and {spec.vocab_size}", where="--top-logprobs")
    requests = []
    for prompt in _each(prompts):
        ids, ends = _ids(prompt, tokenizer, options.get("prompt_type"))
        check_ids(ids, spec)
        if options.get("ignore_eos") or options.get("eos_token_id") is not None:
            ends = ()
        before = _shown(prompt, ids, tokenizer) if options.get("include_input") else ""
        request = Request(ids, _room(len(ids), options, spec), sampling, stop_ids.union(ends), strings,
                          bool(options.get("logprobs") or options.get("return_output_log_probs") or top), top, beams, before,
                          options.get("detokenize", True), grammar, bool(options.get("prompt_logprobs")))
        requests += [request] if beams else [_draw(request, number) for number in range(count)]
    return requests


def _shown(prompt: Any, ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """A prompt as text: as it was given, where it was one."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(ids) if tokenizer else ""


def _draw(request: Request, number: int) -> Request:
    """The request for the next of several answers to one prompt."""
    seed = request.sampling.seed
    return request if not number or seed is None else replace(request, sampling=replace(request.sampling, seed=seed + number))


def _sampling(options: Options) -> Sampling:
    drawing = {name: value for name in ("temperature", "top_k", "top_p", "min_p") if (value := options.get(name)) is not None}
    penalties = {name: value for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
                 if (value := options.get(name)) is not None}
    do_sample = options.get("do_sample")
    return Sampling(bool(drawing) if do_sample is None else do_sample, seed=options.get("seed"), **drawing, **penalties)  # type: ignore[arg-type]


def _beams(options: Options) -> Beams | None:
    beams, count = options.get("num_beams", 1), options.get("num_return_sequences", 1)
    for name, value in (("num-beams", beams), ("num-return-sequences", count)):
        if value < 1:
            raise ModelLinkError(f"{name} is {value}, it must be at least 1", where=f"--{name}")
    if beams == 1:
        return None
    if count > beams:
        raise ModelLinkError(f"{count} answers cannot come from {beams} beams", where="--num-return-sequences",
                             fix=f"use at most {beams}")
    early = options.get("early_stopping", False)
    if early not in (True, False, "never"):
        raise ModelLinkError(f"early_stopping is {early!r}, it must be True, False or 'never'", where="early_stopping")
    if not math.isfinite(penalty := options.get("length_penalty", 1.0)):
        raise ModelLinkError(f"length-penalty is {penalty}", where="--length-penalty")
    return Beams(beams, count, penalty, early)


def _stops(options: Options, spec: ModelSpec, tokenizer: Tokenizer | None) -> tuple[frozenset[int], tuple[str, ...]]:
    """Token ids and strings that end an answer."""
    stops, ends = _list(options.get("stop")), _list(options.get("eos_token_id"))
    strings = tuple(item for item in stops if isinstance(item, str))
    if "" in strings:
        raise ModelLinkError("a stop string is empty", where="--stop")
    if strings and tokenizer is None:
        raise _no_tokenizer("a stop string")
    check_stop_ids([item for item in stops if isinstance(item, int)], spec, "--stop")
    check_stop_ids(ends, spec, "eos_token_id")
    if options.get("ignore_eos"):
        ends = []
    elif options.get("eos_token_id") is None and tokenizer is not None:
        ends = list(tokenizer.eos_token_ids)
    return frozenset(item for item in [*stops, *ends] if isinstance(item, int)), strings


def check_stop_ids(ids: Sequence[int], spec: ModelSpec, where: str) -> None:
    """Raise for a token that never comes because the model does not know it."""
    wrong = next((index for index in ids if not 0 <= index < spec.vocab_size), None)
    if wrong is not None:
        raise ModelLinkError(f"an answer cannot end with the token id {wrong}; the model knows ids from 0 to "
                             f"{spec.vocab_size - 1}", where=where)


def _list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, (str, int)) else list(value)


def check_ids(ids: Sequence[int], spec: ModelSpec, what: str = "the prompt") -> None:
    """Raise where there is no token, or one that the model does not know."""
    if not ids:
        raise ModelLinkError(f"{what} has no tokens", fix="give at least one word")
    wrong = next((index for index in ids if not 0 <= index < spec.vocab_size), None)
    if wrong is not None:
        raise ModelLinkError(f"{what} holds the token id {wrong}; the model knows ids from 0 to {spec.vocab_size - 1}",
                             fix="use the tokenizer that belongs to the model")


def _each(prompts: Prompts) -> list[Any]:
    """A list of prompts, however many there are; tensors and arrays of one or two dimensions are token ids."""
    prompts = _plain(prompts)
    if not isinstance(prompts, (str, Chat, Sequence)):
        raise _no_prompt()
    if isinstance(prompts, (str, Chat)) or (len(prompts) and isinstance(prompts[0], (int, float, Mapping))):
        return [prompts]
    return [_plain(prompt) for prompt in prompts]


def _plain(value: Any) -> Any:
    """A tensor or an array as a list, also one of numbers that are tensors."""
    if hasattr(value, "tolist"):
        value = value.tolist()
        if not isinstance(value, list):
            raise _no_prompt()
    if isinstance(value, (list, tuple)) and value and getattr(value[0], "ndim", None) == 0:
        value = [item.item() for item in value]
    return value


def _ids(prompt: Any, tokenizer: Tokenizer | None, prompt_type: str | None) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a prompt, and those that end an answer to it beside the usual ones."""
    if not isinstance(prompt, (str, Chat)) and len(prompt) and isinstance(prompt[0], Mapping):
        prompt = Chat(prompt)
    if not isinstance(prompt, (str, Chat)):
        try:
            return [operator.index(index) for index in prompt], ()
        except TypeError:
            raise _no_prompt() from None
    if tokenizer is None:
        raise _no_tokenizer("a text or a chat")
    if isinstance(prompt, str):
        check_text(prompt)
        return tokenizer.encode(prompt), ()
    return encode_prompt(tokenizer, prompt, prompt_type)


def check_text(text: str) -> None:
    """Raise for half a character, which Python's texts may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelLinkError(f"the text is not Unicode at character {error.start}: {text[error.start]!a}",
                             fix="write it in UTF-8") from None


def _no_prompt() -> ModelLinkError:
    return ModelLinkError("a prompt is a text, token ids (whole numbers), or a chat, or a list of any of these")


def _no_tokenizer(what: str) -> ModelLinkError:
    return ModelLinkError(f"{what} needs a tokenizer, and the checkpoint carries none", where="--tokenizer-name-or-path",
                          fix="give the Hugging Face folder of the model with its tokenizer.json")


def longest(spec: ModelSpec) -> int | float:
    """How many tokens a sequence may have; angles that follow its length have no end."""
    return math.inf if spec.rope_scaling_type == "dynamic" else spec.max_position_embeddings


def _room(prompt: int, options: Options, spec: ModelSpec) -> int:
    """How many tokens may come after a prompt of that many."""
    wanted, limit = options.get("max_new_tokens"), options.get("max_length")
    room = longest(spec) - prompt
    least = 0 if options.get("prompt_logprobs") else 1
    if room < least:
        raise NoRoom(f"the prompt has {prompt} tokens; the model's longest sequence is {spec.max_position_embeddings}",
                     fix="shorten the prompt")
    if not wanted and limit is not None:  # the original's 0 says that the other one counts
        wanted = limit - prompt
        if wanted < 1:
            raise ModelLinkError(f"the prompt has {prompt} tokens, max-length is {limit}", where="--max-length")
    if wanted is None:
        return int(min(DEFAULT_NEW_TOKENS, room))
    if wanted < least:
        raise ModelLinkError(f"max-new-tokens is {wanted}, it must be at least {least}", where="--max-new-tokens")
    if wanted > room:
        raise NoRoom(f"the prompt has {prompt} tokens, with {wanted} new ones it outgrows the model's longest sequence of "
                     f"{spec.max_position_embeddings}", where="--max-new-tokens", fix=f"use at most {room}")
    return wanted
