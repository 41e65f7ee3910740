"""A text that grows token by token, and the words that end it.

Pieces never split a character and never hold a part of a stop string: what could be the beginning of one is held back until
it is known whether it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from modellink.data_prep import StreamDecoder, Tokenizer


class GrowingText:
    """The text of one answer.

    Args:
        tokenizer: None where a checkpoint has none; the text is then empty.
        stops: strings that end the text and are not part of it.

    Attributes:
        text: what is certain so far.
        stopped: a stop string came; nothing is added any more.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._stops = tuple(stops)
        self._held = ""
        self.text, self.stopped = "", False

    @property
    def length(self) -> int:
        """Characters so far, with those that are held back."""
        return len(self.text) + len(self._held)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, possibly empty."""
        return self._take(self._decoder.push(token_id)) if self._decoder else ""

    def finish(self) -> str:
        """What was held back, when no token comes any more."""
        if self._decoder is None or self.stopped:
            return ""
        piece = self._take(self._decoder.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        self.text += rest
        return piece + rest

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held, piece = True, "", text[:min(ends)]
        else:
            split = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            piece, self._held = text[:split], text[split:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
