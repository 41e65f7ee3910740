# SPDX-License-Identifier: Apache-2.0
"""Incremental detokenization, and stop strings.

Pieces never split a character and never contain a part of a stop string: text that could be the beginning of
one is held back until more text decides it.
"""

from __future__ import annotations

from collections.abc import Sequence

from modellink.data_prep import StreamDecoder, Tokenizer


class GrowingText:
    """The text of one completion.

    Args:
        tokenizer: None if the checkpoint has none; the text then stays empty.
        stops: strings that end the text and are not part of it.

    Attributes:
        text: the text so far, without what is held back.
        stopped: a stop string occurred; nothing is added any more.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._stops = tuple(stops)
        self._held = ""
        self.text, self.stopped = "", False

    @property
    def length(self) -> int:
        """Characters so far, including those held back."""
        return len(self.text) + len(self._held)

    def push(self, token_id: int) -> str:
        """Add a token and return the new piece of text, which may be empty."""
        return self._add(self._decoder.push(token_id)) if self._decoder else ""

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        if self._decoder is None or self.stopped:
            return ""
        piece = self._add(self._decoder.finish())
        rest = "" if self.stopped else self._held
        self._held = ""
        self.text += rest
        return piece + rest

    def _add(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held, piece = True, "", text[:min(ends)]
        else:
            split = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            piece, self._held = text[:split], text[split:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])),
                0)
