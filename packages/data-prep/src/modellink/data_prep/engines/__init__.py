# SPDX-License-Identifier: Apache-2.0
"""Tokenizer engines: the libraries that turn text into ids; `open_engine` picks one by the files of a folder.

`tokenizer.json` is run by `tokenizers`. A folder without one needs an extra: sentencepiece for `tokenizer.model`, tiktoken for
`*.tiktoken`, transformers (its slow tokenizers) for anything else.

Not here: bos, special tokens by name and chat templates; those belong to the Tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from modellink.data_prep.engines.engine import Choice, Engine, Flat, Span, flatten, surrounded
from modellink.kernels.errors import ModelLinkError

__all__ = ["Choice", "Engine", "Flat", "Span", "flatten", "has_vocabulary", "open_engine", "surrounded"]


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder has a vocabulary file that `open_engine` supports."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.tiktoken"))


def open_engine(folder: Path, choice: Choice = "auto") -> Engine:
    """Open the engine for a folder.

    Raises:
        ModelLinkError: the folder has no file that the choice can read, or a library is missing.
    """
    if choice == "gigatoken":
        from modellink.data_prep.engines.gigatoken import GigaToken

        return GigaToken(folder)
    if choice == "tokenizers" or (choice == "auto" and (folder / "tokenizer.json").is_file()):
        from modellink.data_prep.engines.huggingface import HuggingFace

        return HuggingFace(folder)
    if choice == "sentencepiece" or (choice == "auto" and (folder / "tokenizer.model").is_file()):
        from modellink.data_prep.engines.sentencepiece import SentencePiece

        return SentencePiece(folder)
    if choice == "tiktoken" or (choice == "auto" and any(folder.glob("*.tiktoken"))):
        from modellink.data_prep.engines.tiktoken import Tiktoken

        return Tiktoken(folder)
    if choice == "transformers" or (folder / "vocab.json").is_file() or (folder / "vocab.txt").is_file():
        from modellink.data_prep.engines.transformers import Transformers

        return Transformers(folder)
    raise ModelLinkError("the folder has no tokenizer.json", where=folder, fix="tokenizer.model and .tiktoken files work too "
                         "(extras sentencepiece, tiktoken); models are not downloaded from a hub")
