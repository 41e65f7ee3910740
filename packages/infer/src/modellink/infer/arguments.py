# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments of `generate` and `stream`, and the checks that need neither model nor tokenizer. Imports
no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from modellink.infer.sampling import BeamSearch, Sampling, out_of_range
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.messages import note


class GenerationArguments(TypedDict, total=False):
    """Arguments of `generate` and `stream`. Defaults are in parentheses.

    - `max_new_tokens` (128, or what fits), `max_length`: longest completion, or longest prompt and completion
      together.
    - `do_sample`: sample tokens (True if temperature, top_k, top_p or min_p is given).
    - `temperature` (1.0), `top_k` (50), `top_p` (1.0), `min_p` (0), `repetition_penalty` (1),
      `presence_penalty` (0), `frequency_penalty` (0): see `Sampling`.
    - `seed`: of each request, independent of the batch; the completions of one prompt use consecutive seeds.
    - `num_beams` (1), `length_penalty` (1.0), `early_stopping` (False, True or "never"): beam search; see
      beam.py.
    - `num_return_sequences` (1): completions per prompt: the best beams, or several samples.
    - `stop`: strings or token ids that end a completion, in addition to the checkpoint's end tokens.
      `eos_token_id` replaces those end tokens; `ignore_eos` (False) ignores them.
    - `logprobs` (False): report the log-probability of each token. `top_logprobs` (0): and of that many
      alternatives. `return_output_log_probs` is an alias of `logprobs`. `prompt_logprobs` (False): report
      those of the prompt tokens too; `max_new_tokens` may then be 0.
    - `include_input` (False): start the text with the prompt. `detokenize` (True): decode the tokens to text.
    - `json_schema`, `regex`: what the completion must match, see grammar.py; a schema is an object or JSON
      text.
    - `prompt_type`: the template for chats, see template.py (the one given to `load`, else the one the
      checkpoint was trained with, else the tokenizer's own).

    Arguments of the original's API that have no effect here (`IGNORED`) are accepted with a note.
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


IGNORED = {"bos_token_id": "the tokenizer adds it", "pad_token_id": "sequences are not padded",
           "recompute": "keys and values are always cached",
           "tokenizer": "the engine uses the one it was loaded with"}
_noted: set[str] = set()


def check_arguments(arguments: GenerationArguments) -> None:
    """Check names, ranges and combinations of arguments.

    Raises:
        ModelLinkError: an unknown name, a number out of range, arguments that contradict each other.
    """
    names = GenerationArguments.__annotations__
    unknown = next((name for name in arguments if name not in names), None)
    if unknown:
        raise ModelLinkError(f"generate has no argument {unknown}",
                             fix=near(unknown, list(names)) or f"the arguments are {', '.join(names)}")
    sampling_of(arguments)
    beams = beam_search_of(arguments)
    has_grammar = arguments.get("json_schema") is not None or arguments.get("regex") is not None
    if arguments.get("json_schema") is not None and arguments.get("regex") is not None:
        raise ModelLinkError("a completion can match a schema or a regular expression, not both",
                             where="--json-schema, --regex", fix="remove one of them")
    if beams and has_grammar:
        raise ModelLinkError("beam search does not support schemas and regular expressions",
                             where="--num-beams", fix="use one beam, or remove the schema or expression")
    if beams and arguments.get("prompt_logprobs"):
        raise ModelLinkError("beam search does not report log-probabilities of the prompt",
                             where="--num-beams", fix="use one beam, or remove prompt_logprobs")
    if "" in as_list(arguments.get("stop")):
        raise ModelLinkError("a stop string is empty", where="--stop")


def note_ignored(arguments: GenerationArguments) -> None:
    """Print a note about each argument that has no effect, once per process."""
    for name in IGNORED.keys() - _noted:
        if arguments.get(name) is not None:
            _noted.add(name)
            note(f"{name} has no effect: {IGNORED[name]}")


def sampling_of(arguments: GenerationArguments) -> Sampling:
    filters = _given(arguments, "temperature", "top_k", "top_p", "min_p")
    penalties = _given(arguments, "repetition_penalty", "presence_penalty", "frequency_penalty")
    do_sample = arguments.get("do_sample")
    return Sampling(bool(filters) if do_sample is None else do_sample, seed=arguments.get("seed"), **filters,
                    **penalties)


def _given(arguments: GenerationArguments, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := arguments.get(name)) is not None}


def beam_search_of(arguments: GenerationArguments) -> BeamSearch | None:
    """Return the beam search that the arguments ask for, None for a single beam."""
    beams, count = arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1)
    if count < 1:
        raise out_of_range("num_return_sequences", count, "at least 1")
    if beams == 1:
        return None
    return BeamSearch(beams, count, arguments.get("length_penalty", 1.0),
                      arguments.get("early_stopping", False))


def as_list(value: Any) -> list[Any]:
    """Return a string or number as a list of one, None as an empty list."""
    if value is None:
        return []
    return [value] if isinstance(value, (str, int)) else list(value)
