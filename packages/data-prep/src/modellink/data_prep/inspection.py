"""What is in a dataset: counts, lengths, and a few documents as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modellink.data_prep.indexed import IndexedDataset, files_of
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.options import option

SHOWN = 60  # tokens of a sample that are shown


@dataclass(frozen=True)
class InspectOptions:
    """What `modellink-preprocess inspect` is told."""

    tokenizer_name_or_path: Path | None = option(None, "folder with tokenizer.json; without it samples are ids")
    samples: int = option(3, "documents to show, evenly spread", minimum=0)
    summary: Path | None = option(None, "write the same to this file as JSON too")


@dataclass
class Inspection:
    """Counts of a dataset; `lengths` are tokens a document: shortest, quartiles, 95 %, longest, mean. Sizes are bytes."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    largest_id: int
    lengths: dict[str, float] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)


def inspect(prefix: Path | str, options: InspectOptions | None = None) -> Inspection:
    """Look at the dataset `prefix` (with or without .bin or .idx).

    Raises:
        ModelLinkError: it is missing or damaged, or the tokenizer is.
    """
    options = options or InspectOptions()
    data = IndexedDataset(prefix)
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
        ids = [int(token) for sequence in data.document(at) for token in sequence[:SHOWN]][:SHOWN]
        known = tokenizer is not None and all(0 <= token < tokenizer.vocab_size for token in ids)
        text = repr(tokenizer.decode(ids, skip_special_tokens=False)) if tokenizer and known else str(ids)
        samples[at] = text + (" ..." if lengths[at] > len(ids) else "")
    bin_path, idx_path = files_of(data.prefix)
    return Inspection(str(data.prefix), data.dtype.name, data.document_count, len(data), data.token_count,
                      bin_path.stat().st_size, idx_path.stat().st_size, largest, stats, samples)
