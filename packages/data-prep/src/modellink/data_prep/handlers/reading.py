# SPDX-License-Identifier: Apache-2.0
"""The settings and the result of a handler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from modellink.data_prep.engines import Flat


@dataclass(frozen=True)
class Reading:
    """How rows become tokens.

    Attributes:
        handler: name of the handler.
        keys: columns of plain text.
        append_eod: end each document or sample with the end token.
        maps: (file, FieldMap as JSON); the file "" is any other file.
        prompt_type, template, hf_chat_template: see `chat_format`.
        date: current date for chat templates that print it, YYYY-MM-DD.
        train_on_prompt: train on all tokens, not only on those of the assistant.
        seq_length: maximum tokens of a sample; `long_samples`: whether longer ones are cut or dropped.
    """

    handler: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    maps: tuple[tuple[str, str], ...] = ()
    prompt_type: str | None = None
    template: str | None = None
    hf_chat_template: bool = False
    date: str | None = None
    train_on_prompt: bool = False
    seq_length: int | None = None
    long_samples: Literal["cut", "drop"] = "cut"


@dataclass
class Batch:
    """Ids of several samples by output; a skipped sample has no ids. `cut` and `dropped` count long samples.

    `empty` counts samples skipped because a question or an answer is empty, `learned` the tokens with a label.
    """

    fields: dict[str, Flat]
    cut: int = 0
    dropped: int = 0
    empty: int = 0
    learned: int = 0


class PlainTokenizer(Protocol):
    """The part of a `Tokenizer` that plain text needs."""

    folder: Path

    @property
    def eod_token_id(self) -> int | None: ...
    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = True) -> Flat: ...
