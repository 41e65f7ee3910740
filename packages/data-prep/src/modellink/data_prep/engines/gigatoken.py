# SPDX-License-Identifier: Apache-2.0
"""`tokenizer.json` run by `gigatoken` (extra `gigatoken`), which is much faster on batches; everything else by `tokenizers`.

It is used if it gives the same ids as `tokenizers` on a set of hard texts and on a sample of the corpus; `verify` compares every
text.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from modellink.data_prep.engines.engine import Flat, library, surrounded
from modellink.data_prep.engines.huggingface import HuggingFace
from modellink.kernels.errors import ModelLinkError

PAGE = resource.getpagesize()
HARD = ("", " ", "a", "  two  spaces ", "\n\n\ttab\r\n", "naïve café", "你好，世界！", "🤗👩\u200d👧", "١٢٣ 12345678",
        "don't WON'T", "\u200b\ufeff", "e\u0301", "日本語と한국어", "def f(x):\n        return x**2\n", "https://a.b/c?d=e&f",
        "$1,234.56", "____", "\x00\x01")
GROWN = 256 << 20  # growth of the process in bytes after which the library, which caches every word, is reloaded


class Fast:
    """A tokenizer.json run only by gigatoken, without `tokenizers`; sufficient for workers on plain text.

    Args:
        source: content of tokenizer.json.
        head, tail: ids added before and after a text.
        eod_token_id: see `Tokenizer`.
        parallel: use all cores; otherwise one, without importing `awkward`, which takes half a second.

    Raises:
        ModelLinkError: the library is missing or does not support this kind of tokenizer.
    """

    def __init__(self, folder: Path, source: str, head: Sequence[int] = (), tail: Sequence[int] = (),
                 eod_token_id: int | None = None, *, parallel: bool = False) -> None:
        self.folder, self.eod_token_id, self.parallel = folder, eod_token_id, parallel
        self._source, self._head, self._tail = source, head, tail
        self._library: Any = library("gigatoken", folder)
        self._load()

    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = True) -> Flat:
        """See `Tokenizer`."""
        if _resident() - self._floor > GROWN:
            self._load()
        if self.parallel:
            layout = self._inner.encode_batch(list(texts)).layout
            offsets = np.asarray(layout.offsets.data, np.int64)
            flat: Flat = np.asarray(layout.content.data)[offsets[0]:offsets[-1]], np.diff(offsets)
        else:
            found = [self._inner.encode(text) for text in texts]
            flat = np.concatenate(found) if found else np.zeros(0, np.uint32), np.fromiter(map(len, found), np.int64, len(found))
        return surrounded(flat, self._head, self._tail) if add_special_tokens else flat

    def _load(self) -> None:
        try:
            self._inner = self._library.Tokenizer.from_json(self._source)
        except Exception as error:  # any exception of the library for an unsupported tokenizer
            raise ModelLinkError(f"gigatoken does not support this tokenizer: {str(error).splitlines()[0]}",
                                 fix="use --tokenizer-backend tokenizers") from None
        self._floor = _resident()


class GigaToken(HuggingFace):
    """See `Engine`.

    Args:
        loaded: the engine of the folder, if it is already open.
        parallel: see `Fast`.

    Raises:
        ModelLinkError: the library is missing or does not support this kind of tokenizer.
    """

    verify = False

    def __init__(self, folder: Path, loaded: HuggingFace | None = None, *, parallel: bool = True) -> None:
        if loaded is None:
            super().__init__(folder)
        else:
            vars(self).update(vars(loaded))
        alone, around = (self.encode_batch(["a"], wrap=wrap)[0] for wrap in (False, True))
        start = next((at for at in range(len(around)) if around[at:at + len(alone)] == alone), None)
        if start is None:
            raise ModelLinkError("gigatoken cannot be used: the tokens around a text change its ids", where=folder)
        self.head, self.tail = around[:start], around[start + len(alone):]
        self.fast = Fast(folder, self.source, self.head, self.tail, parallel=parallel)
        self.name = f"gigatoken {metadata.version('gigatoken')} ({HuggingFace.name})"
        self.why = "it gives the same ids as tokenizers here"

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        flat = self.fast.encode_flat(texts, wrap)
        if self.verify and (problem := self._compare(texts, flat, wrap=wrap)):
            raise ModelLinkError(f"gigatoken and tokenizers differ: {problem}", where="--verify-tokenizer",
                                 fix="use --tokenizer-backend tokenizers")
        return flat

    def difference(self, texts: Sequence[str]) -> str:
        """Describe the first text for which the libraries differ; empty if there is no difference."""
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
        """Return texts on which tokenizers tend to differ, with the control tokens of this one."""
        return [*HARD, *(f"a {token} b{token}" for token in list(self.control)[:20])]


def _resident() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * PAGE
