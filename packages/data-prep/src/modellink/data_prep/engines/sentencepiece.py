# SPDX-License-Identifier: Apache-2.0
"""`tokenizer.model` of sentencepiece (extra `sentencepiece`). A bos token is added before a text, as by LLaMA's tokenizers.

Control tokens are those of the model (`<s>`) and those added in `added_tokens.json` or in `added_tokens_decoder` of
`tokenizer_config.json`, except entries marked as not special, which are words, like user-defined pieces. `add_bos_token: false`
in `tokenizer_config.json` turns bos off. Not here: spaces that an added token strips (`lstrip`, `rstrip`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.data_prep.engines.engine import Flat, Span, flatten, library
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json


class SentencePiece:
    """See `Engine`."""

    why = "the folder contains tokenizer.model but no tokenizer.json"

    def __init__(self, folder: Path) -> None:
        module = library("sentencepiece", folder)
        file = folder / "tokenizer.model"
        if not file.is_file():
            raise ModelLinkError("the folder has no tokenizer.model", where=folder)
        content = file.read_bytes()
        try:
            self._model: Any = module.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # an exception type of the library
            raise ModelLinkError(f"not a sentencepiece model: {error}", where=file, fix="copy the file again") from None
        self.name = f"sentencepiece {module.__version__}"
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        ids = range(self._model.vocab_size())
        self.control = {self._model.id_to_piece(index): index for index in ids if self._model.is_control(index)}
        self._added = _added_tokens(folder, config)
        words = {text for text, (_, special) in self._added.items() if not special}
        self.control |= {text: index for text, (index, special) in self._added.items() if special}
        self.vocab_size = max([len(ids), *(index + 1 for index, _ in self._added.values())])
        self.raw_bytes = frozenset(index for index in ids if self._model.is_byte(index))
        self._bos = [self._model.bos_id()] if config.get("add_bos_token", True) and self._model.bos_id() >= 0 else []
        self._texts = {index: text for text, (index, _) in self._added.items()}
        self._ids = self.control | {text: self._added[text][0] for text in words}
        self._tokens, self._words = _any_of(self._ids), _any_of(words)
        self.fingerprint = hashlib.sha256(content + repr((self._bos, self._added)).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        head = self._bos if wrap else []
        return [head + self._split(text, self._tokens) for text in texts]

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        return flatten(self.encode_batch(texts, wrap=wrap))

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        return self._split(text, self._words)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        return None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Decode control and added tokens by their text; the library does not know them."""
        skipped = set(self.control.values())
        apart = skipped | set(self._texts)
        if not apart & set(ids):
            return str(self._model.decode(list(ids)))
        if skip_special_tokens:
            ids = [index for index in ids if index not in skipped]
        text, run = "", list[int]()
        for index in [*ids, -1]:
            if index < 0 or index in apart:
                text += self._model.decode(run)
                text += (self.id_to_token(index) or "") if index >= 0 else ""
                run = []
            else:
                run.append(index)
        return text

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token][0]
        index = self._model.piece_to_id(token)
        return None if index == self._model.unk_id() and token != self._model.id_to_piece(index) else int(index)

    def id_to_token(self, index: int) -> str | None:
        if index in self._texts:
            return self._texts[index]
        return str(self._model.id_to_piece(index)) if 0 <= index < self._model.vocab_size() else None

    def _split(self, text: str, tokens: re.Pattern[str]) -> list[int]:
        """Return the ids of a text in which the texts `tokens` are single tokens."""
        found, end = [], 0
        for match in tokens.finditer(text):
            found += [*self._model.encode(text[end:match.start()]), self._ids[match[0]]]
            end = match.end()
        return found + self._model.encode(text[end:]) if end < len(text) or not end else found


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Return the added tokens: text to id and whether it is special."""
    file = folder / "added_tokens.json"
    plain = read_json(file) if file.is_file() else {}
    described = config.get("added_tokens_decoder") or {}
    try:
        found = {str(text): (int(index), True) for text, index in plain.items()}
        return found | {str(token["content"]): (int(index), bool(token.get("special", True)))
                        for index, token in described.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelLinkError("the added tokens are not a mapping of strings to ids", where=folder,
                             fix="copy added_tokens.json and tokenizer_config.json again") from None
