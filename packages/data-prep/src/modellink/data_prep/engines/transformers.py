# SPDX-License-Identifier: Apache-2.0
"""Slow tokenizers without a tokenizer.json, run by transformers (extra `transformers`). Code in the folder is never run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink.data_prep.engines.engine import Flat, Span, flatten, library
from modellink.kernels.errors import ModelLinkError


class Transformers:
    """See `Engine`."""

    why = "the folder has no tokenizer.json; transformers reads its files"
    raw_bytes: frozenset[int] = frozenset()

    def __init__(self, folder: Path) -> None:
        module = library("transformers", folder)
        try:
            self._inner: Any = module.AutoTokenizer.from_pretrained(str(folder), use_fast=False, trust_remote_code=False,
                                                                    local_files_only=True)
        except Exception as error:  # any exception of transformers for a folder
            raise ModelLinkError(f"transformers cannot read the tokenizer: {str(error).splitlines()[0]}", where=folder) from None
        self.name = f"transformers {module.__version__} ({type(self._inner).__name__})"
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.stat().st_size < 1 << 28 and path.suffix in (".json", ".txt", ".model", ".tiktoken"):
                digest.update(path.name.encode() + path.read_bytes())
        self.fingerprint = digest.hexdigest()
        self.vocab_size = len(self._inner)
        self.control = dict(zip(self._inner.all_special_tokens, self._inner.all_special_ids, strict=True))

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        return [self._inner.encode(text, add_special_tokens=wrap) for text in texts]

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        return flatten(self.encode_batch(texts, wrap=wrap))

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        return None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def token_to_id(self, token: str) -> int | None:
        index = self._inner.convert_tokens_to_ids(token)
        return None if index is None or (index == self._inner.unk_token_id and token != self._inner.unk_token) else int(index)

    def id_to_token(self, index: int) -> str | None:
        return str(self._inner.convert_ids_to_tokens(index)) if 0 <= index < self.vocab_size else None
