# SPDX-License-Identifier: Apache-2.0
"""Instruction samples from the three .bin/.idx pairs of modellink-preprocess, in an order that depends only on the seed.

    PREFIX_packed_input_ids_document        token ids
    PREFIX_packed_labels_document           token ids that count towards the loss, -100 elsewhere; not shifted
    PREFIX_packed_attention_mask_document   1; in a packed set the number of the sample (from 1), and 0 on padding

The loss of an iteration is the mean over all tokens that count, however they are spread over micro batches and ranks. As in
pretraining, a position in the data is one number, the samples consumed by all ranks.

Not here: templates, labels and packing (data-prep), and the order of a blend (mixture.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset

from modellink.core.config import DataConfig, InstructionConfig
from modellink.core.config.data import INSTRUCTION_FIELDS
from modellink.core.data.batch import Batch, over_global_batch
from modellink.core.data.documents import starts_by_number
from modellink.core.data.mixture import Mixture, Samples
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import note

LOOKED_AT = 100  # rows to examine, to detect a packed set
INPUTS, MASK, LABELS = FIELDS = INSTRUCTION_FIELDS


@dataclass(frozen=True)
class Sample:
    """One row of a data set; all arrays have its length.

    Attributes:
        tokens: token ids.
        labels: the token after each position, -100 if it does not count towards the loss.
        segments: number of the sample that each token of a packed row belongs to. None: the row is one sample.
    """

    tokens: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    segments: np.ndarray[Any, Any] | None


class Instructions:
    """All rows under a prefix in file order; rows longer than `seq_length` are truncated."""

    def __init__(self, prefix: str, seq_length: int, *, packed: bool) -> None:
        self.seq_length, self.packed, self.prefix = seq_length, packed, prefix
        self.fields = {field: IndexedDataset(f"{prefix}_packed_{field}_document") for field in FIELDS}
        self.lengths = self.fields[INPUTS].sequence_lengths
        for field in (MASK, LABELS):
            if not np.array_equal(self.fields[field].sequence_lengths, self.lengths):
                raise ModelLinkError(f"{field} and {INPUTS} have samples of different lengths", where=prefix,
                                     fix="the files belong to different data sets: run modellink-preprocess again")
        if packed and self._is_one_length and not any(self._numbers(row) != {1} for row in range(len(self))):
            raise ModelLinkError("all rows have the same length, as packed rows do, but the attention mask does not number "
                                 "their samples",
                                 where=f"{prefix}_packed_{MASK}_document, --reset-position-ids",
                                 fix="pack the data with modellink-preprocess --pack (the original's --pack does not number "
                                 "samples), or remove --reset-position-ids if a row is one sample")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def _is_one_length(self) -> bool:
        return len(self) > 1 and bool((self.lengths == self.lengths[0]).all())

    def _numbers(self, row: int) -> set[int]:
        """The values in the attention mask of a row."""
        return set(np.unique(self.fields[MASK][row]).tolist())

    @property
    def looks_packed(self) -> bool:
        """Whether any of the examined rows holds more than one sample."""
        return any(max(self._numbers(row), default=1) > 1 for row in range(0, len(self), max(len(self) // LOOKED_AT, 1)))

    @property
    def cut(self) -> int:
        """Number of truncated rows."""
        return int((self.lengths > self.seq_length).sum())

    def __getitem__(self, row: int) -> Sample:
        tokens, labels = self._read(INPUTS, row), np.append(self._read(LABELS, row)[1:], IGNORE_INDEX)
        segments = self._segments(row) if self.packed else None
        if segments is not None:
            inside = np.append(segments[1:], 0) == segments
            labels = np.where(inside, labels, IGNORE_INDEX)  # a sample does not predict the next one
        stop = self.seq_length
        if len(tokens) > stop:  # the label of the last token is cut off
            labels = np.append(labels[:stop - 1], IGNORE_INDEX)
        return Sample(tokens[:stop], labels[:stop], None if segments is None else segments[:stop])

    def _read(self, field: str, row: int) -> np.ndarray[Any, Any]:
        """A copy: megatron-core returns memory of its file, which becomes invalid with the data set."""
        return np.array(self.fields[field][row], dtype=np.int64)

    def _segments(self, row: int) -> np.ndarray[Any, Any]:
        numbers = self._read(MASK, row)
        steps = np.diff(numbers)
        if numbers[0] != 1 or not ((steps == 0) | (steps == 1) | (numbers[1:] == 0)).all():
            raise ModelLinkError("the attention mask does not number the samples of the row",
                                 where=f"{self.prefix}_packed_{MASK}_document, row {row}, --reset-position-ids",
                                 fix="pack the data with modellink-preprocess --pack")
        return numbers


@dataclass(frozen=True)
class Share:
    """The training, validation or test part of a data set; sample numbers continue over epochs."""

    samples: Instructions
    rows: range
    seed: int
    shuffle: bool

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.rows))
        return self.samples[self.rows[self._order(epoch)[place] if self.shuffle else place]]

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        known: dict[int, np.ndarray[Any, Any]] = self.__dict__.setdefault("orders", {})
        if epoch not in known:
            for old in [other for other in known if other < epoch - 1]:
                del known[old]
            known[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return known[epoch]


def shares(total: int, split: str) -> list[range]:
    """The rows for training, validation and test, in this order."""
    parts = [float(part) for part in split.split(",")]
    parts += [0.0] * (3 - len(parts))
    edges = [round(total * sum(parts[:count]) / sum(parts)) for count in range(4)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def build_sets(data: DataConfig, instruction: InstructionConfig, *, seed: int) -> list[Samples[Sample] | None]:
    """Training, validation and test samples of one data set or a blend; None for an empty set.

    Raises:
        ModelLinkError: a data set without training samples, or files that do not belong together.
    """
    prefixes, weights = data.blend()
    sets = [_split(prefix, data, instruction, seed) for prefix in prefixes]
    made: list[Samples[Sample] | None] = []
    for parts in zip(*sets, strict=True):
        there = [(part, weight) for part, weight in zip(parts, weights or [1.0], strict=True) if part is not None]
        made.append(Mixture(*zip(*there, strict=True)) if there else None)
    return made


def _split(prefix: str, data: DataConfig, instruction: InstructionConfig, seed: int) -> list[Share | None]:
    samples = Instructions(prefix, data.seq_length, packed=data.reset_position_ids)
    rows = shares(len(samples), data.split)
    if not rows[0]:
        raise ModelLinkError(f"no training data: the training share of {len(samples)} samples is empty",
                             where=f"--data-path {prefix}, --split", fix="use more data, or another split")
    if not samples.packed and samples.looks_packed:
        note(f"rows of {prefix} hold several samples, which attend to each other; --reset-position-ids separates them")
    if samples.cut:
        note(f"{samples.cut} of {len(samples)} samples of {prefix} are longer than --seq-length {data.seq_length} and are "
             "truncated")
    return [Share(samples, part, seed, instruction.shuffle) if part else None for part in rows]


def collate(samples: Sequence[Sample], length: int) -> Batch:
    """Samples as rows of `length` tokens, padded on the right, which causal attention does not see."""
    shape = (len(samples), length)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE_INDEX)
    packed = samples[0].segments is not None
    segments = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        tokens[row, :size] = torch.from_numpy(sample.tokens)
        labels[row, :size] = torch.from_numpy(sample.labels)
        if sample.segments is not None:
            segments[row, :size] = torch.from_numpy(sample.segments)
    mask = labels != IGNORE_INDEX
    return Batch(tokens, labels.masked_fill(~mask, 0), mask.float(), starts_by_number(segments) if packed else None, restart=True)


def padded_length(longest: int, data: DataConfig, instruction: InstructionConfig, multiple: int) -> int:
    """The length that a micro batch is padded to; `multiple` makes it divisible by the ranks of a sequence."""
    if not instruction.variable_seq_lengths:
        return data.seq_length
    step = math.lcm(instruction.pad_to_multiple_of, multiple)
    return min(math.ceil(longest / step) * step, data.seq_length)


def iteration(share: Samples[Sample], data: DataConfig, instruction: InstructionConfig, *, consumed: int, dp_rank: int, dp: int,
              multiple: int, vocab_size: int, device: torch.device,
              group: Callable[[], dist.ProcessGroup] | None = None) -> Iterator[Batch]:
    """This rank's micro batches of the iteration that starts at sample `consumed`.

    Args:
        group: the current data-parallel group, which counts the tokens of the loss together.

    Raises:
        ModelLinkError: a token id is outside the model's vocabulary.
    """
    size, batches = data.micro_batch_size, []
    for number in range(data.num_microbatches(dp, consumed)):
        start = consumed + (number * dp + dp_rank) * size
        samples = [share[place] for place in range(start, start + size)]
        longest = max(len(sample.tokens) for sample in samples)
        batch = collate(samples, padded_length(longest, data, instruction, multiple))
        if (largest := int(batch.tokens.max())) >= vocab_size:
            raise ModelLinkError(f"token id {largest} is outside the model's vocabulary of {vocab_size}",
                                 where=f"--data-path, sample {start}", fix="tokenize the data with this model's tokenizer")
        batches.append(batch.to(device))
    return iter(over_global_batch(batches, dp, group))
