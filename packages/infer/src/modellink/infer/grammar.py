# SPDX-License-Identifier: Apache-2.0
"""Grammars that a completion must match: a JSON schema or a regular expression, compiled by llguidance (extra
`constrained`).

JSON is written on one line, with a space after commas and colons, so that a completion cannot get lost in
white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from modellink.data_prep import Tokenizer
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def make_grammar(tokenizer: Tokenizer | None, *, json_schema: Mapping[str, Any] | str | None = None,
                 regex: str | None = None) -> str | None:
    """Return the grammar of a JSON schema (an object or JSON text) or a regular expression; None if neither
    is given.

    Raises:
        ModelLinkError: the schema or expression is invalid or not supported, llguidance is not installed, or
            there is no tokenizer.
    """
    if json_schema is None and regex is None:
        return None
    where = "--regex" if json_schema is None else "--json-schema"
    matcher_class = _library()
    if tokenizer is None or not (tokenizer.folder / "tokenizer.json").is_file():
        raise ModelLinkError("constrained output needs a tokenizer.json",
                             where=tokenizer.folder if tokenizer else where)
    try:
        if json_schema is None:
            grammar: str = matcher_class.grammar_from_regex(str(regex))
        else:
            text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
            grammar = matcher_class.grammar_from_json_schema(text, overrides=STYLE)
        problem = matcher(tokenizer, grammar).get_error()
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        lines = problem.splitlines()
        line = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
        raise ModelLinkError(f"invalid or not supported: {line[:200]}", where=where)
    return grammar


@lru_cache(maxsize=64)
def matcher(tokenizer: Tokenizer, grammar: str) -> LLMatcher:
    """Return the compiled grammar at the start of a completion. It is shared: advance only a copy of it."""
    return _library()(_vocabulary(tokenizer), grammar, log_level=0)


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
