"""The safetensors file format: reading where each tensor lies, and writing one tensor at a time.

Format: 8 bytes little-endian length, a JSON header of that length, the tensors end to end
(https://github.com/huggingface/safetensors#format). The safetensors library checks a file (hostile headers, wrong lengths,
holes); only the offsets are taken from the header here, because the library's memory map would make the whole file count as
ours. Its writer wants all tensors of a file in memory; what is made here from names, dtypes and shapes is filled in later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modellink.ckpt_convert.formats.tensors import Stored
from modellink.ckpt_convert.formats.writing import FileLayout, Planned, Slot
from modellink.kernels.errors import ModelLinkError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        ModelLinkError: the file is missing, damaged or cut off, or a tensor is not of a floating dtype (quantised weights).
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelLinkError("a file of weights is missing", where=path, fix="copy it here again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLinkError(f"not a whole safetensors file: {error}", where=path,
                             fix="it was cut off or damaged; copy it again") from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ModelLinkError(f"{name} is stored as {entry['dtype']}; only {', '.join(DTYPES)} are converted", where=path,
                                 fix="quantised weights must be made whole first")
        found[name] = Stored(path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def layout(tensors: Mapping[str, Planned]) -> FileLayout:
    """The file of `tensors`, those with wider numbers first so that all are aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = [], 0
    for name, planned in ordered.items():
        header[name] = {"dtype": NAMES[planned.dtype], "shape": planned.shape, "data_offsets": [at, at + planned.nbytes]}
        offsets.append(at)
        at += planned.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    slots = tuple(Slot(name, start + offset, ordered[name]) for name, offset in zip(ordered, offsets, strict=True))
    return FileLayout(start + at, ((0, len(text).to_bytes(8, "little") + text),), slots)
