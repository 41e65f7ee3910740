# SPDX-License-Identifier: Apache-2.0
"""The interface of a tokenizer engine, and helpers that several engines share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from modellink.kernels.errors import ModelLinkError

Choice = Literal["auto", "tokenizers", "gigatoken", "sentencepiece", "tiktoken", "transformers"]
Span = tuple[int, int]  # characters
Flat = tuple[NDArray[Any], NDArray[np.int64]]  # ids of several texts concatenated, and the length of each


class Engine(Protocol):
    """One library over one vocabulary.

    Attributes:
        name: library and version.
        why: the reason this library is used.
        fingerprint: SHA-256 of the files it was made from.
        vocab_size: number of ids, added tokens included; every id is below it.
        control: texts of control tokens, with their ids; not those that the model treats as text, such as `<think>`.
        raw_bytes: ids of the 256 byte tokens of a sentencepiece vocabulary.
    """

    name: str
    why: str
    fingerprint: str
    vocab_size: int
    control: dict[str, int]
    raw_bytes: frozenset[int]

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        """Return the ids of each text; control tokens are recognized, `wrap` adds the tokens around a text (often bos)."""

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        """Return the result of `encode_batch` as one array."""

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        """Return the ids of a text in which control tokens are text; `at_start`: it is the beginning of the encoded text."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        """Encode one text without wrapping and return ids and character spans; None if the library has no spans."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, index: int) -> str | None: ...


def flatten(lists: Sequence[Sequence[int]]) -> Flat:
    """Concatenate lists of ids to `Flat`."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths


def surrounded(flat: Flat, head: Sequence[int], tail: Sequence[int], *, empty: bool = True) -> Flat:
    """Add `head` and `tail` around each text; without `empty`, only around texts that have ids."""
    if not head and not tail:
        return flat
    ids, lengths = flat
    added = np.where((lengths > 0) | empty, len(head) + len(tail), 0)
    ends = np.cumsum(lengths + added)
    found = np.empty(int(ends[-1]) if len(ends) else 0, ids.dtype)
    fresh = np.zeros(len(found), bool)
    for at, index in enumerate(head):
        places = (ends - lengths - added)[added > 0] + at
        found[places], fresh[places] = index, True
    for at, index in enumerate(reversed(tail), 1):
        places = ends[added > 0] - at
        found[places], fresh[places] = index, True
    found[~fresh] = ids
    return found, lengths + added


def library(name: str, folder: Path) -> Any:
    """Import an optional library.

    Raises:
        ModelLinkError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ModelLinkError(f"this tokenizer needs the library {name}", where=folder,
                             fix=f"install modellink-data-prep[{name}]") from None
