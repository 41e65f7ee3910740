# SPDX-License-Identifier: Apache-2.0
"""Plain text for pretraining: each selected column becomes its own dataset, or several columns one text. A row is a document."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modellink.data_prep.engines import Flat, surrounded
from modellink.data_prep.handlers.reading import Batch, PlainTokenizer, Reading
from modellink.data_prep.handlers.rows import text_of
from modellink.kernels.errors import ModelLinkError

PLACE = re.compile(r"\{(\w+)\}")


class GeneralPretrainHandler:
    """Tokenizes columns unchanged, with the special tokens that the tokenizer adds around a text (LLaMA adds bos).

    `reading.append_eod` ends each document that has tokens with the end-of-document token.
    """

    small_ids, ranking, wording = True, False, ""

    def __init__(self, tokenizer: PlainTokenizer, reading: Reading) -> None:
        self.tokenizer, self.columns, self.outputs = tokenizer, list(reading.keys), list(reading.keys)
        self.optional: list[str] = []
        self.named: list[str] = []
        if reading.append_eod and tokenizer.eod_token_id is None:
            raise ModelLinkError("the tokenizer has no end-of-document token", where=tokenizer.folder,
                                 fix="remove --append-eod, or set eos_token in its tokenizer_config.json")
        self._end = [tokenizer.eod_token_id] if reading.append_eod and tokenizer.eod_token_id is not None else []

    def rows_of(self, path: Path) -> GeneralPretrainHandler:
        return self

    def parse(self, row: Mapping[str, Any]) -> list[str]:
        """Return the texts of the columns."""
        texts = []
        for key in self.columns:
            if key not in row:
                raise ValueError(f"the row has no {key!r}")
            texts.append(text_of(row[key], key))
        return texts

    def encode(self, samples: Sequence[list[str]]) -> Batch:
        return Batch({output: self._documents(texts)
                      for output, texts in zip(self.outputs, zip(*samples, strict=True), strict=True)})

    def _documents(self, texts: Sequence[str]) -> Flat:
        """Drop empty texts, also if the tokenizer would turn them into a bos token."""
        there = [text for text in texts if text]
        if not there:
            return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
        ids, lengths = surrounded(self.tokenizer.encode_flat(there), [], self._end, empty=False)
        if len(there) == len(texts):
            return ids, lengths
        everywhere = np.zeros(len(texts), np.int64)
        everywhere[[bool(text) for text in texts]] = lengths
        return ids, everywhere


class TextHandler(GeneralPretrainHandler):
    """Combines several columns to one text, by the wording in `handlers.json`."""

    def __init__(self, tokenizer: PlainTokenizer, reading: Reading, about: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, reading)
        self._text, self._around = about["text"], about.get("around", {})
        self.wording = json.dumps(about, sort_keys=True)
        self.columns, self.optional, self.outputs = list(about["columns"]), list(about.get("optional", [])), ["text"]

    def parse(self, row: Mapping[str, Any]) -> list[str]:
        values = dict(zip(self.columns, super().parse(row), strict=True))
        for name in self.optional:
            value = row.get(name)
            values[name] = _put(self._around[name], {name: text_of(value, name)}) if value not in (None, "") else ""
        return [_put(self._text, values)]


def _put(text: str, values: Mapping[str, str]) -> str:
    return PLACE.sub(lambda match: values.get(match[1], match[0]), text)
