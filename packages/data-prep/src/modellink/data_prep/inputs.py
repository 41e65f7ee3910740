"""From `--input` to pieces of work.

An input is a file, a folder (the files in it that have a known ending, sorted by name) or a glob. All of them in order are cut
into pieces of about the same number of bytes. Pieces depend on the inputs and that number alone, so that any number of
workers makes the same ones, and a run that continues finds the ones it knows.
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
    """Consecutive spans of the inputs: the unit that one worker tokenizes and that is noted when it is done."""

    index: int
    spans: tuple[tuple[Path, Span], ...]
    bytes: int


def open_source(path: Path) -> Source:
    """The reader for a file, chosen by its ending.

    Raises:
        ModelLinkError: the ending is unknown, or the file is not what its ending says.
    """
    ending = _ending(path)
    if ending is None:
        raise ModelLinkError(f"no reader for {path.suffix or 'a file without an ending'}", where=path,
                             fix=f"known endings are {', '.join(FORMATS)}")
    try:
        return FORMATS[ending](path)
    except unreadable() as error:
        raise ModelLinkError(f"the file cannot be read: {error}", where=path) from None


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that files, folders and globs stand for, in order.

    Raises:
        ModelLinkError: one of them does not exist or holds no file with a known ending.
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
            raise ModelLinkError("the input does not exist, or the pattern fits no file", where=item,
                                 fix=near(path.name, names) or "give a file, a folder, or a pattern in quotation marks")
        found += files
    seen: set[Path] = set()
    for path in found:
        if path in seen:
            raise ModelLinkError("an input is given twice", where=path)
        seen.add(path)
    return found


def cut(sources: Sequence[Source], size: int) -> list[Piece]:
    """Cut the sources into pieces of about `size` bytes, small files together and large ones apart."""
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
    """SHA-256 over names, sizes and times of change: whether a run that continues has the same files before it."""
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
        raise ModelLinkError("the folder holds no file with a known ending", where=folder,
                             fix=f"known endings are {', '.join(FORMATS)}")
    kinds = sorted({_ending(path) or "" for path in readable})
    if len(kinds) > 1 and kinds != [".json", ".jsonl"]:  # a LICENSE.txt beside the data is not data
        raise ModelLinkError(f"the folder holds files of several kinds: {', '.join(kinds)}", where=folder,
                             fix=f"say which you mean with a pattern, e.g. --input '{folder}/*{kinds[0]}'")
    return readable
