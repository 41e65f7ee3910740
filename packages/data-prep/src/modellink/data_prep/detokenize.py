# SPDX-License-Identifier: Apache-2.0
"""Decode token ids one at a time, for streaming a generation.

A chunk never ends inside a character, and the chunks together equal `Tokenizer.decode` of all ids. Each push decodes
a short window, never the whole text: a byte-level vocabulary needs the bytes of the last characters, a sentencepiece one the
token before (it strips the space at the start of what it decodes), and both are in the window.
"""

from __future__ import annotations

from modellink.data_prep.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
WINDOW, KEPT = 32, 8  # tokens; four bytes settle where a character starts, so eight tokens are context enough


class StreamDecoder:
    """Incremental decoder of one text.

    Args:
        tokenizer: the tokenizer of the ids.
        skip_special_tokens: omit special tokens from the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._fresh = 0  # position in the window of the first token after the last settled text
        self._given = 0  # characters of the window's text that were returned already

    def push(self, token_id: int) -> str:
        """Return the text that is certain now, possibly empty; a character is returned with its last byte."""
        if self.skip and self.tokenizer.is_special(token_id):
            return ""  # decode drops it before it joins bytes, so it must not separate two of them
        self._window.append(token_id)
        if self.tokenizer.is_raw_byte(token_id):
            return ""  # a run of raw bytes is decoded as one: a wrong byte at its end changes all of it
        text = self._decode()
        # An unfinished character at the end decodes to one U+FFFD.
        unfinished = text.endswith(REPLACEMENT)
        piece = self._hand_out(text[:-1] if unfinished else text)
        if piece and not unfinished:
            self._shorten(self._fresh)
        elif unfinished and len(self._window) > WINDOW:  # a long run of bytes that form no character
            self._shorten(len(self._window) - KEPT)
            self._fresh = 0  # the unfinished character's bytes stay until it is finished
        return piece

    def finish(self) -> str:
        """Return the rest of the text after the last token. The decoder can then be used for another text."""
        piece = self._hand_out(self._decode())
        self._window, self._fresh, self._given = [], 0, 0
        return piece

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip)

    def _hand_out(self, settled: str) -> str:
        piece = settled[self._given:]
        self._given = max(self._given, len(settled))
        return piece

    def _shorten(self, start: int) -> None:
        self._window = self._window[start:]
        text = self._decode()
        self._fresh = len(self._window)
        self._given = len(text) - text.endswith(REPLACEMENT)
