# SPDX-License-Identifier: Apache-2.0
"""`tokenizer.json`, run by the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from modellink.data_prep.engines.engine import Flat, Span, flatten
from modellink.kernels.errors import ModelLinkError


class HuggingFace:
    """See `Engine`."""

    name = f"tokenizers {tokenizers.__version__}"
    why = "the folder contains tokenizer.json"

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelLinkError("the folder has no tokenizer.json", where=folder, fix="load it with the "
                                 "AutoTokenizer of transformers and write it with save_pretrained, which creates that file")
        content = file.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self.source = content.decode("utf-8")
            self._main = _load(self.source)
        except Exception as error:  # the library raises a bare Exception
            raise ModelLinkError(f"not a tokenizer: {error}", where=file, fix="copy the file again") from None
        vocabulary = self._main.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        added = self._main.get_added_tokens_decoder()
        self.control = {token.content: index for index, token in added.items() if token.special}
        falls_back = b"ByteFallback" in self._main.decoder.__getstate__() if self._main.decoder else False
        names = [f"<0x{byte:02X}>" for byte in range(256)] if falls_back else []
        self.raw_bytes = frozenset(vocabulary[name] for name in names if name in vocabulary)

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        return [item.ids for item in self._main.encode_batch_fast(list(texts), add_special_tokens=wrap)]

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        return flatten(self.encode_batch(texts, wrap=wrap))

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        engine = self._literal if at_start else self._literal_later
        ids: list[int] = engine.encode(text, add_special_tokens=False).ids
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        found = self._main.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._main.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        index: int | None = self._main.token_to_id(token)
        return index

    def id_to_token(self, index: int) -> str | None:
        token: str | None = self._main.id_to_token(index)
        return token

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        engine = _load(self.source)
        engine.encode_special_tokens = True
        return engine

    @cached_property
    def _literal_later(self) -> tokenizers.Tokenizer:
        """Encode a part of a text that is not its start: a Metaspace that marks the first word must not mark it."""
        state = json.loads(self.source)
        spaces = [node for node in _nodes(state.get("pre_tokenizer")) if node.get("prepend_scheme") == "first"]
        if not spaces:
            return self._literal
        for node in spaces:
            node["prepend_scheme"] = "never"
        engine = _load(json.dumps(state))
        engine.encode_special_tokens = True
        return engine


def _load(source: str) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer.from_str(source)
    # Ignore truncation and padding settings in tokenizer.json, which are for models of a fixed length.
    engine.no_truncation()
    engine.no_padding()
    return engine


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)
