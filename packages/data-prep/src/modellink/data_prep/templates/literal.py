# SPDX-License-Identifier: Apache-2.0
"""Treat control tokens in user text as text: `<|im_end|>` in a question must not end it.

While a template runs, each such text is replaced by one unused character (from Unicode's private planes). Control tokens that are
spelled out afterwards were written by the template. Tokens that the vocabulary marks as not special, such as `<think>` or
`<tool_call>`, are words of the model and remain tokens in any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

from modellink.data_prep.tokenizer import Tokenizer

FIRST, LAST, BEGIN, END = "\U000f0000", "\U0010fffd", "\U0010fffe", "\U0010ffff"
STAND_IN = re.compile(f"[{FIRST}-{LAST}]")
# BEGIN and END are the marks of a template around the text of the assistant.


class Literals:
    """The replacements in one conversation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._control, self._risky = _patterns(tokenizer)
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """Return `value` with control tokens replaced in its texts, also in lists, objects and their keys."""
        if isinstance(value, str):
            return self._risky.sub(self._stand_in, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """Return the text with the replacements undone."""
        return STAND_IN.sub(lambda match: self._hidden[ord(match[0]) - ord(FIRST)], text) if self._hidden else text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that mixes hidden and template text."""
        if not STAND_IN.search(text):
            return self.tokenizer.encode(text, add_special_tokens=False)
        return [index for part, start in self._parts(text, 0) for index in self._encode_part(part, at_start=start == 0)]

    def encode_marked(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, bool]]:
        """Return the ids of such a text, and for each whether it has a character in one of the spans (sorted, disjoint)."""
        found = None if STAND_IN.search(text) else self.tokenizer.encode_spans(text)
        if found is not None:
            return [(index, any(start < stop and end > begin for begin, stop in spans))
                    for index, (start, end) in zip(*found, strict=True)]
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        return [(index, any(begin <= left < stop for begin, stop in spans))
                for left, right in pairwise(edges)
                for part, start in self._parts(text[left:right], left)
                for index in self._encode_part(part, at_start=start == 0)]

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[0] not in self._hidden:
            self._hidden.append(match[0])
        return chr(ord(FIRST) + self._hidden.index(match[0]))

    def _parts(self, text: str, offset: int) -> Iterator[tuple[str, int]]:
        """Yield control tokens and the text between them, each with its start."""
        end = 0
        for match in self._control.finditer(text):
            if match.start() > end:
                yield text[end:match.start()], offset + end
            yield match[0], offset + match.start()
            end = match.end()
        if end < len(text):
            yield text[end:], offset + end

    def _encode_part(self, part: str, *, at_start: bool) -> list[int]:
        control = self.tokenizer.control_tokens.get(part)
        return self.tokenizer.encode_literal(self.show(part), at_start=at_start) if control is None else [control]


@lru_cache(maxsize=8)
def _patterns(tokenizer: Tokenizer) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the control tokens, and the texts that must be hidden in user text."""
    texts = sorted(tokenizer.control_tokens, key=len, reverse=True)
    control = "|".join(map(re.escape, texts)) or r"(?!)"
    return re.compile(control), re.compile(f"{control}|[{FIRST}-{END}]")
