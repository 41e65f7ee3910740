"""Plain text for pretraining: each chosen column becomes a dataset of its own, a row is a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError


class GeneralPretrainHandler:
    """Tokenises columns as they are, with the special tokens the tokenizer itself puts around a text (a LLaMA one adds bos).

    Args:
        keys: the columns.
        append_eod: end each document that has tokens with the end-of-document token.
    """

    small_ids = True

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer, self.columns, self.outputs = tokenizer, list(keys), list(keys)
        if append_eod and tokenizer.eod_token_id is None:
            raise ModelLinkError("the tokenizer has no end-of-document token", where=tokenizer.folder,
                                 fix="leave out --append-eod, or set eos_token in its tokenizer_config.json")
        self._end = [tokenizer.eod_token_id] if append_eod and tokenizer.eod_token_id is not None else []

    def parse(self, row: Mapping[str, Any]) -> list[str]:
        """The texts of the columns."""
        texts = []
        for key in self.columns:
            if key not in row:
                raise ValueError(f"it has no {key!r}")
            if not isinstance(row[key], str):
                kind = "empty (null)" if row[key] is None else f"a {type(row[key]).__name__}"
                raise ValueError(f"{key!r} is {kind}, not a text")
            try:
                row[key].encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key!r} is not UTF-8") from None
            texts.append(row[key])
        return texts

    def encode(self, samples: Sequence[list[str]]) -> list[dict[str, list[int]]]:
        columns = [self.tokenizer.encode_batch(texts) for texts in zip(*samples, strict=True)]
        return [{key: ids + self._end if ids else ids for key, ids in zip(self.outputs, row, strict=True)}
                for row in zip(*columns, strict=True)]
