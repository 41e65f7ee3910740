# SPDX-License-Identifier: Apache-2.0
"""A short digest of a checkpoint's files from their sizes and samples of their content, without reading gigabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 16, 4096


def fingerprint(files: Iterable[Path], *more: str) -> str:
    """Return a digest of the names, sizes and sampled content of files, and of further texts.

    Files of at most 64 KiB are read completely. Training changes every weight, so samples detect it; single numbers changed by
    hand may go unnoticed.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(SAMPLES):
                file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    for text in more:
        digest.update(f"{text}\0".encode())
    return digest.hexdigest()[:32]
