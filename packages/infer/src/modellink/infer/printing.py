# SPDX-License-Identifier: Apache-2.0
"""Prints the completions of `generate`, on the first rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from modellink.infer.engine import Engine, Stream
from modellink.infer.request import Generation, GenerationRequest
from modellink.kernels.progress import Work


def print_streams(engine: Engine, requests: Sequence[GenerationRequest], *, first_rank: bool) -> int:
    """Print each completion as it is generated. Return the number of tokens."""
    tokens = 0
    for number, request in enumerate(requests, 1):
        stream = Stream(engine, request)
        if first_rank:
            _print_heading("prompt", number, len(requests))
        for piece in stream:
            if first_rank:
                print(piece, end="", flush=True)
        if first_rank:
            print(flush=True)
        tokens += len(stream.generation.token_ids)
    return tokens


def print_completions(engine: Engine, prompts: Sequence[Any], requests: Sequence[GenerationRequest], *,
                      first_rank: bool, as_json: bool) -> int:
    """Print each completion as soon as it and all before it are finished. Return the number of tokens."""
    total = sum(request.beams.count if request.beams else 1 for request in requests)
    per_prompt, number, tokens = total // len(prompts), 0, 0
    # on a terminal the completions show the progress
    show = first_rank and len(requests) > 1 and not sys.stdout.isatty()
    with Work("generating", len(requests), unit="completions", show=show) as work:
        for completions in engine.iter_completions(requests, work.advance):
            for completion in completions:
                number, tokens = number + 1, tokens + len(completion.token_ids)
                if first_rank and as_json:
                    print(_as_json(prompts[(number - 1) // per_prompt], completion), flush=True)
                elif first_rank:
                    _print_heading("completion" if per_prompt > 1 else "prompt", number, total)
                    print(completion.text, flush=True)
    return tokens


def _as_json(prompt: Any, completion: Generation) -> str:
    values = {"prompt": prompt, "text": completion.text, "token_ids": completion.token_ids,
              "finish_reason": completion.finish_reason}
    if completion.logprobs is not None:
        values["logprobs"] = completion.logprobs
    return json.dumps(values, ensure_ascii=False)


def _print_heading(what: str, number: int, total: int) -> None:
    if total > 1:
        print(f"--- {what} {number} of {total} ---")
