# SPDX-License-Identifier: Apache-2.0
"""`dataset_info.json`: named datasets with their files and row formats (LlamaFactoryInstructionHandler).

An entry has `file_name` (a file, folder or pattern in the same folder) and optionally `formatting` (alpaca or sharegpt),
`columns`, `tags` and `ranking`. Keys that select rows (`num_samples`, `subset`, ...) are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink.data_prep.handlers.fields import FieldMap, field_map
from modellink.data_prep.inputs import find_inputs
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.files import read_json

NAME = "dataset_info.json"
IGNORED = ("images", "videos", "audios")  # columns of images, which are not read
REFUSED = ("num_samples", "subset", "folder")


def find_datasets(names: Sequence[str], folder: Path | None) -> list[tuple[str, FieldMap]]:
    """Return the files of the named datasets and how they are read, in order; names may be separated by commas.

    Raises:
        ModelLinkError: the folder or a name is missing, or an entry is invalid.
    """
    if folder is None:
        raise ModelLinkError(f"LlamaFactoryInstructionHandler needs the folder of {NAME}", where="--dataset-dir")
    file = folder / NAME
    known = read_json(file)
    if not isinstance(known, dict):
        raise ModelLinkError("the file is not an object of datasets", where=file)
    found = []
    for name in [part.strip().rsplit("/", 1)[-1] for item in names for part in item.split(",") if part.strip()]:
        if name not in known:
            raise ModelLinkError(f"unknown dataset {name!r}", where=file,
                                 fix=near(name, list(known)) or f"known: {', '.join(sorted(known)[:20])}")
        where = f"{file}, {name}"
        found += [(str(path), _map(known[name], where)) for path in _files(known[name], where, folder)]
    return found


def _files(entry: Any, where: str, folder: Path) -> list[Path]:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise ModelLinkError("the entry has no file_name", where=where, fix="only files are supported, no hub and no scripts")
    for key in (*REFUSED, *(["split"] if entry.get("split") != "train" else [])):
        if entry.get(key) is not None:
            raise ModelLinkError(f"{key} is {entry[key]!r}, but all rows of a file are read", where=where,
                                 fix="write the selected rows to a separate file and remove the key")
    _check_inside(folder, [folder / name], name, where)
    files = find_inputs([str(folder / name)])
    _check_inside(folder, files, name, where)
    return files


def _check_inside(folder: Path, files: list[Path], name: str, where: str) -> None:
    if not all(path.resolve().is_relative_to(folder.resolve()) for path in files):
        raise ModelLinkError(f"{name!r} is outside the folder", where=where)


def _map(entry: dict[str, Any], where: str) -> FieldMap:
    style = entry.get("formatting", "alpaca")
    if style not in ("alpaca", "sharegpt"):
        raise ModelLinkError(f"unknown formatting {style!r}", where=where, fix="use alpaca or sharegpt")
    columns = entry.get("columns", {})
    if not isinstance(columns, dict):
        raise ModelLinkError("columns is not an object", where=where)
    given = {name: value for name, value in columns.items() if name not in IGNORED}
    if entry.get("tags"):
        given["tags"] = entry["tags"]
    return field_map(style, given, ranking=bool(entry.get("ranking")), where=where)
