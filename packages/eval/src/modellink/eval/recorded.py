"""The template a checkpoint was trained with, from the manifest beside its weights; read before the checkpoint is opened.

Not here: whether the template is there and fits the tokenizer, which shows when the checkpoint is opened.
"""

from __future__ import annotations

from pathlib import Path

from modellink.kernels.files import read_json

MANIFEST = "modellink.json"  # modellink-ckpt-convert's manifest.py; also read where only this package is installed


def recorded_chat(checkpoint: Path) -> str | None:
    """The prompt type that a checkpoint's manifest names; None where there is no manifest, or it names none."""
    for folder in (checkpoint, checkpoint.parent) if checkpoint.name.startswith("iter_") else (checkpoint,):
        if (folder / MANIFEST).is_file():
            found = read_json(folder / MANIFEST)
            return (found.get("prompt_type") or None) if isinstance(found, dict) else None
    return None
