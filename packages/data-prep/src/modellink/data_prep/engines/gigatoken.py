"""`tokenizer.json`, many texts at a time run by `gigatoken` (extra `gigatoken`), which is much faster; all else by `tokenizers`.

It is used when it gives the same ids as `tokenizers` on texts chosen to be hard and on a sample of the corpus; `verify` compares
every text.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from modellink.data_prep.engines import Flat, library, surrounded
from modellink.data_prep.engines.huggingface import HuggingFace
from modellink.kernels.errors import ModelLinkError

PAGE = resource.getpagesize()
HARD = ("", " ", "a", "  two  spaces ", "\n\n\ttab\r\n", "naïve café", "你好，世界！", "🤗👩\u200d👧", "١٢٣ 12345678",
        "don't WON'T", "\u200b\ufeff", "e\u0301", "日本語と한국어", "def f(x):\n        return x**2\n", "https://a.b/c?d=e&f",
        "$1,234.56", "____", "\x00\x01")
GROWN = 256 << 20  # bytes by which the process may grow before the library, which remembers every word, is loaded anew


class GigaToken(HuggingFace):
    """See `Engine`.

    Args:
        loaded: the folder's engine, when there is one already.

    Raises:
        ModelLinkError: the library is missing or does not know this kind of tokenizer.
    """

    verify = False

    def __init__(self, folder: Path, loaded: HuggingFace | None = None) -> None:
        if loaded is None:
            super().__init__(folder)
        else:
            vars(self).update(vars(loaded))
        self._library: Any = library("gigatoken", folder)
        self.name = f"gigatoken {metadata.version('gigatoken')} ({HuggingFace.name})"
        self.why = "it gives the same ids as tokenizers here"
        self._fast = self._load()
        alone, around = (self.encode_batch(["a"], wrap=wrap)[0] for wrap in (False, True))
        start = next((at for at in range(len(around)) if around[at:at + len(alone)] == alone), None)
        if start is None:
            raise ModelLinkError("gigatoken cannot be used: what is put around a text changes it", where=folder)
        self._head, self._tail = around[:start], around[start + len(alone):]

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        if _resident() - self._floor > GROWN:
            self._fast = self._load()
        layout = self._fast.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        flat: Flat = np.asarray(layout.content.data)[offsets[0]:offsets[-1]].astype(np.int64), np.diff(offsets)
        if wrap:
            flat = surrounded(flat, self._head, self._tail)
        if self.verify and (problem := self._compare(texts, flat, wrap=wrap)):
            raise ModelLinkError(f"gigatoken and tokenizers differ: {problem}", where="--verify-tokenizer",
                                 fix="use --tokenizer-backend tokenizers")
        return flat

    def difference(self, texts: Sequence[str]) -> str:
        """The first text for which the libraries differ, in words, or nothing."""
        return self._compare(texts, self.encode_flat(texts, wrap=True), wrap=True)

    def _compare(self, texts: Sequence[str], flat: Flat, *, wrap: bool) -> str:
        theirs = self.encode_batch(texts, wrap=wrap)
        for text, ours, other in zip(texts, np.split(flat[0], np.cumsum(flat[1])[:-1]), theirs, strict=True):
            if ours.tolist() != other:
                at = next((at for at, pair in enumerate(zip(ours, other, strict=False)) if pair[0] != pair[1]),
                          min(len(ours), len(other)))
                return f"at token {at} of {text[:60]!r}"
        return ""

    def hard_texts(self) -> list[str]:
        """Texts that tell two tokenizers apart, with this one's control tokens in them."""
        return [*HARD, *(f"a {token} b{token}" for token in list(self.control)[:20])]

    def _load(self) -> Any:
        try:
            found = self._library.Tokenizer.from_json(self.source)
        except Exception as error:  # whatever the library raises over a kind it does not know
            raise ModelLinkError(f"gigatoken does not know this tokenizer: {str(error).splitlines()[0]}",
                                 fix="use --tokenizer-backend tokenizers") from None
        self._floor = _resident()
        return found


def _resident() -> int:
    """Bytes of this process in memory (Linux)."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * PAGE
