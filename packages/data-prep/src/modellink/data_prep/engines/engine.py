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
Flat = tuple[NDArray[Any], NDArray[np.int64]]  # ids of several texts in one row, and how many each has


class Engine(Protocol):
    """One library over one vocabulary.

    Attributes:
        name: library and version.
        why: why this one is used, in words.
        fingerprint: SHA-256 of the files it was made from.
        vocab_size: number of ids, added tokens included; every id is below it.
        control: texts that stand for a control token, with their ids; `<think>`, which is text to its model, is none.
        raw_bytes: ids of a sentencepiece vocabulary's 256 single bytes.
    """

    name: str
    why: str
    fingerprint: str
    vocab_size: int
    control: dict[str, int]
    raw_bytes: frozenset[int]

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        """Ids of each text; control tokens in it are recognized, `wrap` adds what belongs around a text (often bos)."""

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        """`encode_batch` as one array."""

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a text in which control tokens are text; `at_start` says whether it is the beginning of what is encoded."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        """As `encode_batch` of one without wrapping, with the characters each token stands for; None: the library has none."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, index: int) -> str | None: ...


def flatten(lists: Sequence[Sequence[int]]) -> Flat:
    """Lists of ids as `Flat`."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths


def surrounded(flat: Flat, head: Sequence[int], tail: Sequence[int], *, empty: bool = True) -> Flat:
    """The same with `head` and `tail` around each text; without `empty` only around texts that have ids."""
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
