"""`tokenizer.model` of sentencepiece (extra `sentencepiece`). A bos token is put before a text, as LLaMA's tokenizers do it.

Control tokens are the model's own (`<s>`) and its user-defined pieces are text. `tokenizer_config.json` may say
`add_bos_token: false`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink.data_prep.engines import Flat, Span, flatten, library
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json


class SentencePiece:
    """See `Engine`."""

    why = "the folder holds tokenizer.model and no tokenizer.json"

    def __init__(self, folder: Path) -> None:
        module = library("sentencepiece", folder)
        file = folder / "tokenizer.model"
        if not file.is_file():
            raise ModelLinkError("the folder has no tokenizer.model", where=folder)
        content = file.read_bytes()
        try:
            self._model: Any = module.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # of a type of the library's own
            raise ModelLinkError(f"not a sentencepiece model: {error}", where=file, fix="copy the file anew") from None
        self.name = f"sentencepiece {module.__version__}"
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._model.vocab_size()
        ids = range(self.vocab_size)
        self.control = {self._model.id_to_piece(index): index for index in ids if self._model.is_control(index)}
        self.raw_bytes = frozenset(index for index in ids if self._model.is_byte(index))
        config = folder / "tokenizer_config.json"
        adds = read_json(config).get("add_bos_token", True) if config.is_file() else True
        self._bos = [self._model.bos_id()] if adds and self._model.bos_id() >= 0 else []
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)")

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        head = self._bos if wrap else []
        return [head + self._with_control(text) for text in texts]

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        return flatten(self.encode_batch(texts, wrap=wrap))

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        return None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Control tokens are spelt out between the texts around them; the library leaves them out on its own."""
        if skip_special_tokens or not set(self.control.values()) & set(ids):
            return str(self._model.decode(list(ids)))
        text, run = "", list[int]()
        for index in [*ids, -1]:
            if index < 0 or self._model.is_control(index):
                text += self._model.decode(run)
                text += self._model.id_to_piece(index) if index >= 0 else ""
                run = []
            else:
                run.append(index)
        return text

    def token_to_id(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)
        return None if index == self._model.unk_id() and token != self._model.id_to_piece(index) else int(index)

    def id_to_token(self, index: int) -> str | None:
        return str(self._model.id_to_piece(index)) if 0 <= index < self.vocab_size else None

    def _with_control(self, text: str) -> list[int]:
        found, end = [], 0
        for match in self._pattern.finditer(text):
            found += [*self._model.encode(text[end:match.start()]), self.control[match[0]]]
            end = match.end()
        return found + self._model.encode(text[end:]) if end < len(text) or not end else found
