"""Answers that keep to a JSON schema or a regular expression: before each token, those that would leave it are out.

The `llguidance` library (the extra `constrained`) reads the grammar and says which tokens may follow. A schema's JSON is written
on one line, with a blank after commas and colons, so that no answer gets lost in white space. Not here: beams.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modellink.data_prep import Tokenizer
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(tokenizer: Tokenizer | None, *, json_schema: Mapping[str, Any] | str | None = None,
               regex: str | None = None) -> str | None:
    """The grammar of a schema (an object, or JSON text) or an expression, None where neither is given; checked.

    Raises:
        ModelLinkError: both, a schema or an expression that is wrong or not supported, no library, or no tokenizer.
    """
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and regex is not None:
        raise ModelLinkError("an answer keeps to a schema or to an expression, not to both", where="--json-schema, --regex")
    matcher = _library()
    where = "--regex" if json_schema is None else "--json-schema"
    if tokenizer is None or not (tokenizer.folder / "tokenizer.json").is_file():
        raise ModelLinkError("constrained output needs a tokenizer.json", where=tokenizer.folder if tokenizer else where)
    try:
        found: str = matcher.grammar_from_regex(regex) if regex is not None else matcher.grammar_from_json_schema(
            json_schema if isinstance(json_schema, str) else json.dumps(json_schema), overrides=STYLE)
        problem = _compiled(tokenizer, found).get_error()
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        lines = problem.splitlines()
        line = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
        raise ModelLinkError(f"no answer can be made to keep to this: {line[:200]}", where=where)
    return found


class Constraint:
    """Follows one answer.

    Args:
        ends: token ids that end the answer, where the grammar allows it to end.

    Attributes:
        done: the grammar allows nothing more.
        stuck: it became too complex to follow, or no token can follow.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: str, ends: frozenset[int]) -> None:
        self._matcher = _compiled(tokenizer, grammar).deep_copy()
        self._ends, self._others = frozenset(ends), sorted(set(tokenizer.eos_token_ids) - ends)
        self.done = self.stuck = False

    def narrow(self, logits: Tensor) -> Tensor:
        """Logits [vocabulary] with -inf for every token that may not follow."""
        size = len(logits)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")[:size].astype(bool)
        allowed = np.zeros(size, bool)
        allowed[:len(bits)] = bits
        allowed[_within(self._others, size)] = False
        allowed[_within(self._ends, size)] = self._matcher.is_accepting()
        self.stuck = bool(self._matcher.is_error()) or not allowed.any()
        if self.stuck:
            return logits
        return logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -math.inf)

    def take(self, token: int) -> None:
        """The token came."""
        if token not in self._ends:
            self._matcher.consume_token(token)
            self.done = bool(self._matcher.is_stopped())


def _within(tokens: Iterable[int], size: int) -> list[int]:
    """Those that the model has logits for: a tokenizer may name end tokens beyond its vocabulary."""
    return [token for token in tokens if 0 <= token < size]


def _library() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ModelLinkError("constrained output needs llguidance, which is not installed",
                             fix='python -m pip install "modellink-infer[constrained]"') from None
    return LLMatcher


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer
    source = (tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(source, eos_token=list(tokenizer.eos_token_ids) or None)


@lru_cache(maxsize=64)
def _compiled(tokenizer: Tokenizer, grammar: str) -> LLMatcher:
    """At the beginning of an answer; only copies of it move on."""
    return _library()(_vocabulary(tokenizer), grammar, log_level=0)
