# SPDX-License-Identifier: Apache-2.0
"""Pack several samples into sequences of a fixed length, by first fit decreasing over all samples.

`packed_attention_mask` numbers the samples of a pack from 1 and is 0 on padding, so that a reader sees the end of each sample
without looking for end tokens, which also follow every turn. Padding has the id 0 and the label -100. Each pack is one sequence
and one document of exactly `length` tokens. Memory holds four numbers per sample and one pack; only a few parts are open at a
time, since a large input has thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modellink.data_prep.indexed import IndexedDataset, IndexedWriter, files_of
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.progress import Work

INPUTS, MASK, LABELS = "packed_input_ids", "packed_attention_mask", "packed_labels"
PADDING = {INPUTS: 0, MASK: 0, LABELS: IGNORE_INDEX}
OPEN = 16  # parts open at a time


@dataclass
class Packed:
    """The result of packing `samples` samples with `tokens` tokens in total."""

    packs: int
    samples: int
    tokens: int
    length: int

    @property
    def fill(self) -> float:
        """Return the fraction of all packs that is not padding."""
        return self.tokens / (self.packs * self.length) if self.packs else 0.0


def assign(lengths: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """Assign each sample to the first pack with room, longest samples first; samples of one length keep their order.

    Raises:
        ModelLinkError: a sample is longer than a pack.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ModelLinkError(f"a sample of {int(lengths.max()):,} tokens is longer than a pack of {capacity:,}")
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # a tree: each node holds the largest free space among the packs below it
    found = np.empty(len(lengths), np.int64)
    for sample in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length, node = int(lengths[sample]), 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        found[sample] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return found


def pack(parts: Mapping[str, Sequence[Path]], outputs: dict[str, Path], length: int, *, show: bool = True) -> Packed:
    """Write the samples of `parts` (prefixes by field, in order) as packs and return the counts.

    A pack holds its samples in the order of the input.
    """
    sizes = [np.array(IndexedDataset(prefix).lengths) for prefix in parts[INPUTS]]  # copies, so that the files can be closed
    lengths = np.concatenate(sizes) if sizes else np.zeros(0, np.int32)
    firsts = np.cumsum([0, *map(len, sizes)])
    begins = np.concatenate([np.cumsum(part, dtype=np.int64) - part for part in sizes]) if sizes else lengths
    packs = assign(lengths, length)
    order = np.argsort(packs, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(packs))]) if len(packs) else np.zeros(1, np.int64)
    for field, prefix in outputs.items():
        tokens_of = lru_cache(OPEN)(_tokens)
        with Work(f"packing {prefix.name}", len(edges) - 1, unit="packs", show=show) as work, \
                IndexedWriter(prefix, np.dtype("<i4")) as writer:
            for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                row = np.full(length, PADDING[field], np.int32)
                at = 0
                for number, sample in enumerate(order[start:stop].tolist(), 1):
                    part = int(np.searchsorted(firsts, sample, "right")) - 1
                    begin = int(begins[sample])
                    ids = tokens_of(parts[field][part])[begin:begin + int(lengths[sample])]
                    row[at:at + len(ids)] = number if field == MASK else ids
                    at += len(ids)
                writer.add_document(row)
                work.advance()
    return Packed(len(edges) - 1, len(lengths), int(lengths.sum()), length)


def _tokens(prefix: Path) -> NDArray[np.int32]:
    return np.memmap(files_of(prefix)[0], "<i4", mode="r")
