# SPDX-License-Identifier: Apache-2.0
"""Inspect a dataset: counts, lengths and a few documents as text, with the learned tokens of an instruction set marked."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from modellink.data_prep.histogram import histogram
from modellink.data_prep.indexed import IndexedDataset, files_of
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.files import atomic_write
from modellink.kernels.options import option

# The fields that identify an instruction set: the ids that are shown, and their labels.
FIELDS = (("_packed_input_ids_document", "_packed_labels_document"),
          ("_packed_chosen_input_ids_document", "_packed_chosen_labels_document"))


@dataclass(frozen=True)
class InspectOptions:
    """Options of `modellink-preprocess inspect`."""

    tokenizer_name_or_path: Path | None = option(None, "Folder with tokenizer.json. Default: samples are shown as ids.")
    samples: int = option(3, "Documents to show, evenly spaced; learned tokens are in ⟦ ⟧.", minimum=0)
    shown: int = option(60, "Maximum number of tokens shown per document.", unit="tokens", minimum=1)
    histogram: Path | None = option(None, "Write a histogram of document lengths to this SVG file.")
    summary: Path | None = option(None, "Also write the report to this file as JSON.")


@dataclass
class Inspection:
    """Counts of a dataset. `lengths` are tokens per document: minimum, quartiles, 95 %, maximum, mean. Sizes are bytes.

    `learned` counts the tokens with a label, if the dataset has labels.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    largest_id: int
    learned: int | None = None
    lengths: dict[str, float] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)


def inspect(prefix: Path | str, options: InspectOptions | None = None) -> Inspection:
    """Inspect the dataset `prefix` (with or without .bin or .idx; for an instruction set, the prefix given to preprocess).

    Raises:
        ModelLinkError: the dataset or the tokenizer is missing or damaged.
    """
    options = options or InspectOptions()
    data, labels = _open(str(prefix))
    tokenizer = Tokenizer.from_folder(options.tokenizer_name_or_path) if options.tokenizer_name_or_path else None
    ends = np.concatenate([[0], np.cumsum(data.lengths, dtype=np.int64)])[data.boundaries]
    lengths = np.diff(ends)
    stats = {}
    if len(lengths):
        points = np.percentile(lengths, [0, 25, 50, 75, 95, 100])
        names = ("shortest", "25 %", "median", "75 %", "95 %", "longest")
        stats = dict(zip(names, (float(point) for point in points), strict=True)) | {"mean": float(lengths.mean())}
    largest = max((int(data.tokens[at:at + (1 << 24)].max()) for at in range(0, data.token_count, 1 << 24)), default=-1)
    chosen = sorted({int(at) for at in np.linspace(0, data.document_count - 1, options.samples)}) if len(lengths) else []
    samples = {}
    for at in chosen:
        ids, marks = (([int(token) for sequence in item.document(at) for token in sequence[:options.shown]][:options.shown])
                      if item else None for item in (data, labels))
        samples[at] = _sample(ids or [], marks, tokenizer) + (" ..." if lengths[at] > len(ids or []) else "")
    if options.histogram:
        with atomic_write(options.histogram, "w") as file:
            file.write(histogram(lengths, f"{data.prefix.name}: {len(lengths):,} documents"))
    bin_path, idx_path = files_of(data.prefix)
    return Inspection(str(data.prefix), data.dtype.name, data.document_count, len(data), data.token_count,
                      bin_path.stat().st_size, idx_path.stat().st_size, largest, _learned(labels) if labels else None, stats,
                      samples)


def _open(prefix: str) -> tuple[IndexedDataset, IndexedDataset | None]:
    """Return the ids and, if the dataset has labels, the labels."""
    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    for ids, labels in FIELDS:
        bare = prefix.removesuffix(ids)
        if files_of(bare + ids)[1].is_file() and not (bare == prefix and files_of(prefix)[1].is_file()):
            there = files_of(bare + labels)[1].is_file()
            return IndexedDataset(bare + ids), IndexedDataset(bare + labels) if there else None
    return IndexedDataset(prefix), None


def _learned(labels: IndexedDataset) -> int:
    return sum(int((labels.tokens[at:at + (1 << 24)] != IGNORE_INDEX).sum()) for at in range(0, labels.token_count, 1 << 24))


def _sample(ids: list[int], labels: list[int] | None, tokenizer: Tokenizer | None) -> str:
    known = tokenizer is not None and all(0 <= token < tokenizer.vocab_size for token in ids)
    if tokenizer is None or not known:
        return str(ids)
    pieces = []
    pairs = zip(ids, labels or [IGNORE_INDEX] * len(ids), strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return repr("".join(pieces))
