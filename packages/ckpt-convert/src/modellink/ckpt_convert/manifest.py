# SPDX-License-Identifier: Apache-2.0
"""The files that travel with weights: `modellink.json`, and the folder `hf/` next to the iterations of every
checkpoint of ours.

`modellink.json` has ModelSpec, family, dtype, true vocabulary size, prompt type and producer; `hf/` the
original config.json, generation config, tokenizer files and chat template. Converting, training and serving
pass both on unchanged, so that a checkpoint can become a Hugging Face folder again. A Hugging Face folder has
`modellink.json` only if a prompt type is known, and nothing else is read from it: its config.json tells the
rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec, spec_from
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import atomic_write, read_json, write_json

FILE, FOLDER, VERSION = "modellink.json", "hf", 1
CARRIED = ("config.json", "generation_config.json", "chat_template.json", "*.jinja", "tokenizer*",
           "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
           "spiece.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Names of the files of a Hugging Face folder that travel with weights; never Python files."""


@dataclass(frozen=True)
class Manifest:
    """The content of `modellink.json`."""

    family: str
    spec: ModelSpec
    dtype: str
    prompt_type: str | None = None
    producer: str = ""


def companion_files(folder: Path) -> list[Path]:
    """Return the files of a Hugging Face folder that travel with weights."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".py"]
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in CARRIED)]


def copy_file(path: Path, target: Path) -> None:
    """Copy a file atomically, unless the target has the same content already."""
    content = path.read_bytes()
    if not (target.is_file() and target.read_bytes() == content):
        with atomic_write(target) as file:
            file.write(content)


def write_companions(dst: Path | str, described: Manifest, companions: Path | None, *,
                     tokenizer_alone: bool = False) -> None:
    """Write `modellink.json` into the checkpoint folder `dst`, and copy the files that travel from
    `companions` into `hf/`.

    Args:
        tokenizer_alone: `companions` is of another model; do not copy its config.json.
    """
    dst = Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    if companions is not None:
        (dst / FOLDER).mkdir(exist_ok=True)
        for path in companion_files(companions):
            if tokenizer_alone and path.name == "config.json":
                continue
            copy_file(path, dst / FOLDER / path.name)
    write_manifest(dst, described)


def write_manifest(folder: Path, described: Manifest) -> None:
    """Write `modellink.json` into a folder."""
    write_json(folder / FILE, {
        "format_version": VERSION, "family": described.family, "spec": described.spec.to_dict(),
        "dtype": described.dtype, "vocab_size": described.spec.vocab_size,
        "prompt_type": described.prompt_type, "producer": described.producer
        or f"modellink-ckpt-convert {version('modellink-ckpt-convert')}"})


def describes_itself(folder: Path) -> bool:
    """Return whether a checkpoint folder has a manifest."""
    return (folder / FILE).is_file()


def read_manifest(folder: Path | str) -> Manifest | None:
    """Return the manifest of a checkpoint folder, or None if it has none.

    Raises:
        ModelLinkError: it is damaged or of a newer version.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    values: Any = read_json(path)
    try:
        found, family, spec, dtype = (values[key] for key in ("format_version", "family", "spec", "dtype"))
        if not isinstance(found, int) or not isinstance(spec, dict):
            raise TypeError
    except (KeyError, TypeError):
        raise ModelLinkError("the manifest lacks format_version, family, spec or dtype", where=path,
                             fix=f"remove it and give {HELP}") from None
    if found > VERSION:
        raise ModelLinkError(f"the manifest has version {found}, this program reads up to {VERSION}",
                             where=path, fix="upgrade modellink-ckpt-convert")
    return Manifest(str(family), spec_from(spec, str(path)), str(dtype), values.get("prompt_type"),
                    str(values.get("producer")))


HELP = "--tokenizer-name-or-path (a Hugging Face folder with config.json and tokenizer) and --model-type-hf (its family)"
