# SPDX-License-Identifier: Apache-2.0
"""Resolve `--input` and split it into pieces of work.

An input is a file, a folder (its files with a known extension, sorted by name) or a glob. All files in order are split into
pieces of about the same number of bytes. The pieces depend only on the inputs and that number, so they are the same for any
number of workers and for a resumed run.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modellink.data_prep.readers import FORMATS, PACKED, unreadable
from modellink.data_prep.rows import Source, Span
from modellink.kernels.errors import ModelLinkError, near


@dataclass(frozen=True)
class Piece:
    """Consecutive spans of the inputs: the unit that one worker tokenizes and the journal records."""

    index: int
    spans: tuple[tuple[Path, Span], ...]
    bytes: int


def open_source(path: Path) -> Source:
    """Return the reader of a file, chosen by its extension.

    Raises:
        ModelLinkError: the extension is unknown, or the file is of another format.
    """
    ending = _ending(path)
    if ending is None:
        raise ModelLinkError(f"{path.suffix or 'a file without an extension'} is not a supported format", where=path,
                             fix=f"supported extensions: {', '.join(FORMATS)}")
    try:
        return FORMATS[ending](path)
    except unreadable() as error:
        raise ModelLinkError(f"the file cannot be read: {error}", where=path) from None


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Resolve files, folders and globs to files, in order.

    Raises:
        ModelLinkError: one of them does not exist or contains no file with a supported extension.
    """
    found: list[Path] = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            files = _folder(path)
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(item, recursive=True)  # noqa: PTH207 - an absolute pattern too
                           if Path(name).is_file())
        if not files:
            names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ModelLinkError("the input does not exist, or the pattern matches no file", where=item,
                                 fix=near(path.name, names) or "give a file, a folder, or a quoted pattern")
        found += files
    seen: set[Path] = set()
    for path in found:
        if path in seen:
            raise ModelLinkError("an input is given twice", where=path)
        seen.add(path)
    return found


def cut(sources: Sequence[Source], size: int) -> list[Piece]:
    """Split the sources into pieces of about `size` bytes: small files are combined, large ones divided."""
    pieces: list[Piece] = []
    spans: list[tuple[Path, Span]] = []
    weight = 0
    for source in sources:
        for span in source.cut(size):
            spans.append((source.path, span))
            weight += source.weigh(span)
            if weight >= size:
                pieces.append(Piece(len(pieces), tuple(spans), weight))
                spans, weight = [], 0
    if spans:
        pieces.append(Piece(len(pieces), tuple(spans), weight))
    return pieces


def fingerprint(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of paths, sizes and modification times, which shows whether a resumed run has the same inputs."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def _ending(path: Path) -> str | None:
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def _folder(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    readable = [path for path in files if _ending(path)]
    if not readable:
        raise ModelLinkError("the folder contains no file with a supported extension", where=folder,
                             fix=f"supported extensions: {', '.join(FORMATS)}")
    kinds = sorted({_ending(path) or "" for path in readable})
    if len(kinds) > 1 and kinds != [".json", ".jsonl"]:  # a LICENSE.txt next to the data is not data
        raise ModelLinkError(f"the folder contains files of several formats: {', '.join(kinds)}", where=folder,
                             fix=f"choose one with a pattern, e.g. --input '{folder}/*{kinds[0]}'")
    return readable
