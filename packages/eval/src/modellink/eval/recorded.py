# SPDX-License-Identifier: Apache-2.0
"""Read from a checkpoint's manifest the chat template it was trained with, before the checkpoint is opened.

Not here: whether the template exists and fits the tokenizer, which is checked when the checkpoint is opened.
"""

from __future__ import annotations

from pathlib import Path

from modellink.kernels.files import read_json

MANIFEST = "modellink.json"  # as in manifest.py of modellink-ckpt-convert, which may not be installed


def recorded_chat(checkpoint: Path) -> str | None:
    """Return the prompt type in a checkpoint's manifest, or None."""
    for folder in (checkpoint, checkpoint.parent) if checkpoint.name.startswith("iter_") else (checkpoint,):
        if (folder / MANIFEST).is_file():
            found = read_json(folder / MANIFEST)
            return (found.get("prompt_type") or None) if isinstance(found, dict) else None
    return None
