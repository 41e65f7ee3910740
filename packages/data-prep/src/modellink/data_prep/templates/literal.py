"""What people write is text: `<|im_end|>` in a question must not end it.

While a template works on a conversation, each such text stands as one character nobody uses (Unicode's private planes); what is
still spelled out afterwards was written by the template and is a control token. Tokens that a vocabulary marks as not special,
`<think>` or `<tool_call>`, are words of the model and stay tokens in any text.
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
# BEGIN and END are a template's own marks around what the assistant says.


class Literals:
    """The stand-ins of one conversation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._control, self._risky = _patterns(tokenizer)
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """`value` (texts in lists and objects, names of these too) with stand-ins for what would become control tokens."""
        if isinstance(value, str):
            return self._risky.sub(self._stand_in, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with everything spelled out."""
        return STAND_IN.sub(lambda match: self._hidden[ord(match[0]) - ord(FIRST)], text) if self._hidden else text

    def encode(self, text: str) -> list[int]:
        """Ids of a text made of hidden and template text."""
        if not STAND_IN.search(text):
            return self.tokenizer.encode(text, add_special_tokens=False)
        return [index for part, start in self._parts(text, 0) for index in self._encode_part(part, at_start=start == 0)]

    def encode_marked(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, bool]]:
        """Ids of such a text, and whether each has a character of one of the spans (in order, without overlap)."""
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
        """Control tokens and the text between them, each with where it starts."""
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
    """What is a control token, and what must be hidden in what people write."""
    texts = sorted(tokenizer.control_tokens, key=len, reverse=True)
    control = "|".join(map(re.escape, texts)) or r"(?!)"
    return re.compile(control), re.compile(f"{control}|[{FIRST}-{END}]")
