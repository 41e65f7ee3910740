# SPDX-License-Identifier: Apache-2.0
"""The safetensors file format: reading the positions of tensors, and laying out a file before its tensors
exist.

Format: 8 bytes little-endian length, a JSON header of that length, the tensors end to end without gaps
(https://github.com/huggingface/safetensors#format). The library's reader maps the whole file into private
memory, which a process with a memory limit may not do, and its writer needs all tensors of a file at once; so
the header is read and checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.storage.tensors import ITEM_BYTES, Stored, dtype_name
from modellink.ckpt_convert.storage.writing import FileLayout, Planned, Slot
from modellink.kernels.errors import ModelLinkError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LONGEST_HEADER = 100 << 20  # bytes, as in the library
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stored(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name.

    Raises:
        ModelLinkError: the file is missing, damaged or truncated, or a dtype is not floating point (quantized
            weights).
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        _check(header, size - 8 - length)
    except FileNotFoundError:
        raise ModelLinkError("a weight file is missing", where=path, fix="copy it again") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelLinkError(f"not a complete safetensors file: {error}", where=path,
                             fix="it is truncated or damaged; copy it again") from None
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ModelLinkError(f"{name} is stored as {entry['dtype']}; only {', '.join(DTYPES)} are "
                                 f"supported", where=path,
                                 fix="dequantize the weights first")
    return {name: Stored(path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]],
                         tuple(entry["shape"]))
            for name, entry in header.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header has a name twice")
    return found


def _check(header: dict[str, Any], size: int) -> None:
    """Raise a ValueError unless the tensors fill the `size` bytes after the header without gaps and fit their
    shapes."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        numbers = (start, stop, *entry["shape"])
        if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
            raise ValueError(f"{name} has no valid shape and offsets")
        if start != at or stop < start:
            raise ValueError(f"{name} starts at byte {start}, but the previous tensor ends at {at}")
        kind = DTYPES.get(entry["dtype"])
        if kind and stop - start != prod(entry["shape"]) * ITEM_BYTES[kind]:
            raise ValueError(f"{name} has {stop - start} bytes, which do not fit its shape {entry['shape']} "
                             f"in {entry['dtype']}")
        at = stop
    if at != size:
        raise ValueError(f"its tensors have {at:,} bytes, the file has {size:,}")


def layout(tensors: Mapping[str, Planned]) -> FileLayout:
    """Return the layout of a file of `tensors`, wider dtypes first so that all tensors are aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = [], 0
    for name, planned in ordered.items():
        kind = NAMES[dtype_name(planned.dtype)]
        header[name] = {"dtype": kind, "shape": planned.shape, "data_offsets": [at, at + planned.nbytes]}
        offsets.append(at)
        at += planned.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    slots = tuple(Slot(name, start + offset, ordered[name])
                  for name, offset in zip(ordered, offsets, strict=True))
    return FileLayout(start + at, ((0, len(text).to_bytes(8, "little") + text),), slots)
