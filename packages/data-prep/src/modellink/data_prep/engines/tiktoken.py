# SPDX-License-Identifier: Apache-2.0
"""A `*.tiktoken` file (extra `tiktoken`).

The file holds only the merges. The split pattern and the control tokens come from `pattern` and `special_tokens` (name to id) in
`tokenizer_config.json`; those of Qwen are built in.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink.data_prep.engines.engine import Flat, Span, flatten, library
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json

# From tokenization_qwen.py, which Qwen and Qwen1.5 checkpoints contain next to qwen.tiktoken.
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


class Tiktoken:
    """See `Engine`."""

    why = "the folder contains a .tiktoken file but no tokenizer.json"
    raw_bytes: frozenset[int] = frozenset()

    def __init__(self, folder: Path) -> None:
        module = library("tiktoken", folder)
        files = sorted(folder.glob("*.tiktoken"))
        if len(files) != 1:
            raise ModelLinkError(f"the folder contains {len(files)} .tiktoken files, it must be one", where=folder)
        content = files[0].read_bytes()
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        ranks = _ranks(content, files[0])
        if "pattern" in config and isinstance(config.get("special_tokens"), dict):
            pattern, self.control = config["pattern"], dict(config["special_tokens"])
        elif files[0].stem == "qwen":
            pattern, self.control = QWEN_PATTERN, {token: len(ranks) + at for at, token in enumerate(QWEN_CONTROL)}
        else:
            raise ModelLinkError("a .tiktoken file has neither a split pattern nor control tokens",
                                 where=files[0], fix="add pattern and special_tokens to its tokenizer_config.json")
        self._encoding: Any = module.Encoding(files[0].stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.control)
        self.name = f"tiktoken {module.__version__}"
        self.fingerprint = hashlib.sha256(content + repr((pattern, self.control)).encode()).hexdigest()
        self.vocab_size = self._encoding.max_token_value + 1
        self._special = set(self.control.values())

    def encode_batch(self, texts: Sequence[str], *, wrap: bool) -> list[list[int]]:
        return [self._encoding.encode(text, allowed_special="all") for text in texts]

    def encode_flat(self, texts: Sequence[str], *, wrap: bool) -> Flat:
        return flatten(self.encode_batch(texts, wrap=wrap))

    def encode_literal(self, text: str, *, at_start: bool) -> list[int]:
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        return None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._encoding.decode([index for index in ids if not (skip_special_tokens and index in self._special)]))

    def token_to_id(self, token: str) -> int | None:
        if token in self.control:
            return int(self.control[token])
        try:
            return int(self._encoding.encode_single_token(token))
        except KeyError:
            return None

    def id_to_token(self, index: int) -> str | None:
        try:
            return str(self._encoding.decode_single_token_bytes(index).decode("utf-8", "replace"))
        except KeyError:
            return None


def _ranks(content: bytes, file: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ModelLinkError("not a token and its rank", where=f"{file}, line {number}") from None
    return ranks
