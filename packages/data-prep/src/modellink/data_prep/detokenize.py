"""Token ids to text one by one, for showing a generation as it grows.

A piece never ends inside a character, and all pieces together are what `Tokenizer.decode` makes of all ids. Each push decodes
a short window, never the whole text: a byte-level vocabulary needs the bytes of the last characters, a sentencepiece one the
token before (it strips the space at the start of what it decodes), and both are in the window.
"""

from __future__ import annotations

from modellink.data_prep.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
WINDOW, KEPT = 32, 8  # tokens; four bytes settle where a character starts, so eight tokens are context enough


class StreamDecoder:
    """One text in the making.

    Args:
        tokenizer: whose ids come.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._fresh = 0  # where in the window the tokens begin that came after the last settled text
        self._given = 0  # how many characters of the window's text were handed out

    def push(self, token_id: int) -> str:
        """The text that is certain now, possibly empty: a character is handed out with its last byte."""
        if self.skip and self.tokenizer.is_special(token_id):
            return ""  # decode leaves it out before it joins bytes, so it must not stand between two of them
        self._window.append(token_id)
        if self.tokenizer.is_raw_byte(token_id):
            return ""  # a run of raw bytes is text or not as a whole: one wrong byte at its end changes all of it
        text = self._decode()
        # An unfinished character at the end decodes to one U+FFFD.
        unfinished = text.endswith(REPLACEMENT)
        piece = self._hand_out(text[:-1] if unfinished else text)
        if piece and not unfinished:
            self._shorten(self._fresh)
        elif unfinished and len(self._window) > WINDOW:  # an endless row of bytes that are no characters
            self._shorten(len(self._window) - KEPT)
            self._fresh = 0  # the unfinished character's bytes stay until it is finished
        return piece

    def finish(self) -> str:
        """The rest, when no token comes any more. The decoder is then ready for another text."""
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
