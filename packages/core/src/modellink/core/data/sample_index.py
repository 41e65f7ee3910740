# SPDX-License-Identifier: Apache-2.0
"""The cached sample index of pretraining data: a folder of arrays that is complete, checked and belongs to this data, or rebuilt.

megatron-core computes the arrays and reads them with allow_pickle, which would run code. Here its files are written to a
temporary folder that is renamed when complete, and are checked before it reads them: marker, array headers, and whether all
positions lie within the data.

    CACHE/index-PREFIXES-DATA-REQUEST/{*.npy, *-description.txt, modellink.complete}

Not here: the .bin/.idx files, and what the arrays mean (megatron-core's GPTDataset and BlendedDataset).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset

from modellink.kernels.files import incomplete

CHUNK = 1 << 24  # rows of an array in memory at once
DAMAGE = (ArithmeticError, AttributeError, EOFError, KeyError, MemoryError, OSError, RecursionError, TypeError, ValueError)
"""Errors of the readers of JSON and .npy files."""


class _Damaged(Exception):
    pass


def folder_name(prefixes: Sequence[str], data: object, request: object) -> str:
    """The name of the index of these files; it changes with their content and with what is asked for."""
    files = [str(Path(prefix).resolve()) for prefix in prefixes]
    return "-".join(["index", *(hashlib.sha256(repr(part).encode()).hexdigest()[:16] for part in (files, data, request))])


def remove_outdated(folder: Path) -> None:
    """Remove the indexes of the same prefixes whose data has changed since."""
    index, prefixes, data, _ = folder.name.split("-")
    for other in folder.parent.glob(f"{index}-{prefixes}-*"):
        if other.name.split("-")[2] != data:
            shutil.rmtree(other, ignore_errors=True)


def defect(folder: Path, prefixes: Sequence[str], *, values: bool) -> str | None:
    """Why megatron-core must not read the index in `folder`; None if it is complete.

    Args:
        prefixes: of the data.
        values: also check that every position lies within the data, which reads all arrays.
    """
    try:
        if reason := incomplete(folder):
            return reason
        descriptions = sorted(folder.glob("*-description.txt"))
        if not descriptions:
            raise _Damaged("it has no description")
        for path in descriptions:
            _check(path, prefixes, values=values)
    except _Damaged as error:
        return str(error)
    except DAMAGE as error:
        return f"it is damaged: {error}"
    return None


def _check(path: Path, prefixes: Sequence[str], *, values: bool) -> None:
    text = path.read_text("utf-8")
    if hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() != path.name.partition("-")[0]:
        raise _Damaged(f"{path.name} is not the description that its name belongs to")
    described, stem = json.loads(text), str(path).removesuffix("description.txt")
    if described["class"] == "BlendedDataset":
        _check_blend(stem, described, values=values)
    elif described["dataset_path"] in prefixes:
        _check_texts(stem, described["dataset_path"], values=values)
    else:
        raise _Damaged(f"{path.name} is about other data")


def _check_texts(stem: str, prefix: str, *, values: bool) -> None:
    documents = _array(stem + "document_index.npy", "int32")
    starts = _array(stem + "sample_index.npy", "int32", "int64", columns=2)
    order = _array(stem + "shuffle_index.npy", "uint32", "int64")
    if len(order) != len(starts) - 1:
        raise _Damaged(f"{len(order)} samples are ordered, and {len(starts) - 1} have a start")
    if not values:
        return
    data = IndexedDataset(prefix)  # kept, as the lengths are a view of its file
    lengths = data.sequence_lengths
    _within(documents, len(lengths), f"{stem}document_index.npy")
    _within(order, len(order), f"{stem}shuffle_index.npy")
    _within(starts[:, 0], len(documents), f"{stem}sample_index.npy")
    for begin in range(0, len(starts), CHUNK):
        at, offset = numpy.asarray(starts[begin:begin + CHUNK]).T
        if (offset < 0).any() or (offset > lengths[documents[at]]).any() or (numpy.diff(at) < 0).any():
            raise _Damaged(f"{stem}sample_index.npy starts a sample outside of its document")


def _check_blend(stem: str, described: dict[str, Any], *, values: bool) -> None:
    which, sample = _array(stem + "dataset_index.npy", "int16"), _array(stem + "dataset_sample_index.npy", "int64")
    if not len(which) == len(sample) == described["size"]:
        raise _Damaged(f"{stem}dataset_index.npy does not have {described['size']} samples")
    if not values:
        return
    _within(which, len(described["datasets"]), f"{stem}dataset_index.npy")
    for number, part in enumerate(described["datasets"]):
        name = hashlib.md5(json.dumps(part, indent=4).encode(), usedforsecurity=False).hexdigest()
        order = _array(f"{Path(stem).parent}/{name}-{part['class']}-{described['split']}-shuffle_index.npy", "uint32", "int64")
        _within(sample[which == number], len(order), f"{stem}dataset_sample_index.npy")


def _array(path: str, *dtypes: str, columns: int | None = None) -> numpy.ndarray[Any, Any]:
    array: numpy.ndarray[Any, Any] = numpy.load(path, allow_pickle=False, mmap_mode="r")
    if array.dtype.name not in dtypes or array.shape[1:] != (() if columns is None else (columns,)) or array.ndim == 0:
        raise _Damaged(f"{path} is an array of {array.dtype} with shape {array.shape}")
    return array


def _within(array: numpy.ndarray[Any, Any], count: int, path: str) -> None:
    for begin in range(0, len(array), CHUNK):
        part = array[begin:begin + CHUNK]
        if part.min() < 0 or part.max() >= count:
            raise _Damaged(f"{path} has positions outside of the data")
