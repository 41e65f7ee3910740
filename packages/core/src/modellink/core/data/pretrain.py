# SPDX-License-Identifier: Apache-2.0
"""Pretraining samples: blends of .bin/.idx sets through megatron-core's GPTDataset, and which rank reads which sample.

The order of samples depends only on the seed, the data and the length of the run. A position in it is one number, the samples
consumed by all ranks, so a run can be resumed at any data parallel size without reading a sample twice. Extending a run keeps its
order and appends another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.package_info import __version__ as megatron_version

from modellink.core.config import DataConfig
from modellink.core.data import sample_index
from modellink.core.data.batch import Batch, over_global_batch
from modellink.core.data.documents import starts_after
from modellink.core.launch import rank
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import atomic_folder
from modellink.kernels.messages import note

T = TypeVar("T")


@dataclass(frozen=True)
class TokenIds:
    """The tokenizer interface of GPTDataset. Ids on disk are final, so the end-of-document and padding ids never occur."""

    vocab_size: int
    eod: int = -1
    pad: int = -2

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size}


class Texts(GPTDataset):
    """GPTDataset, which would search endlessly for samples in a part without tokens that needs none."""

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        return 1 if num_tokens_per_epoch == 0 else int(super()._get_num_epochs(num_tokens_per_epoch))


@dataclass(frozen=True)
class Parts:
    """Data sets one after another, with `counts` samples of each."""

    sets: Sequence[Any]
    counts: Sequence[int]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, number: int) -> Any:
        for part, count in zip(self.sets, self.counts, strict=True):
            if number < count:
                return part[number % len(part)]
            number -= count
        raise IndexError(number)


def extended(ordered: tuple[int, ...], total: int) -> tuple[int, ...]:
    """The parts of an order, extended to `total` samples."""
    return ordered if sum(ordered) >= total else (*ordered, total - sum(ordered))


def build_datasets(config: DataConfig, *, trained: tuple[int, ...], evaluated: int, seed: int, vocab_size: int) -> list[Any]:
    """Training, validation and test set (None for an empty one).

    Args:
        trained: number of samples in each part of the training set.
        evaluated: number of samples of validation and test set.
    """
    config = replace(config, split=usable_split(config, evaluated=bool(evaluated)))
    train, valid, test = _build(config, (trained[0], evaluated, evaluated), seed, vocab_size)
    more = [_build(config, (count, 0, 0), seed + number, vocab_size)[0] for number, count in enumerate(trained[1:], 1)]
    return [None if train is None else Parts([train, *more], trained), valid, test]


def usable_split(config: DataConfig, *, evaluated: bool) -> str:
    """The split, with 0 for validation or test if a data set has no document in it; prints a note if it is `evaluated`.

    Raises:
        ModelLinkError: a data set has no document for training.
    """
    shares = [*map(float, config.split.split(",")), 0.0, 0.0][:3]
    edges = [sum(shares[:number]) / sum(shares) for number in range(4)]
    for number, name in enumerate(("training", "validation", "test")):
        for prefix in config.blend()[0]:
            documents = Texts.numel_low_level_dataset(IndexedDataset(prefix))
            if not shares[number] or round(edges[number] * documents) < round(edges[number + 1] * documents):
                continue
            if number == 0:
                raise ModelLinkError(f"no training data: the training share has none of the {documents} documents",
                                     where=f"{prefix}, --split", fix="use more data, or another split")
            shares[number] = 0.0
            if evaluated:
                note(f"the {name} share has none of the {documents} documents of {prefix}; evaluation on it is disabled")
    return ",".join(f"{share:g}" for share in shares)


def _build(config: DataConfig, samples: tuple[int, int, int], seed: int, vocab_size: int) -> list[Any]:
    """The three sets with at least `samples` samples each; rank 0 writes the sample index, then all ranks read it."""
    prefixes, _ = config.blend()
    cache = config.data_cache_path or Path(prefixes[0]).parent / "cache"
    request = (config.data_path, config.split, config.seq_length, samples, seed, vocab_size, megatron_version)
    folder = cache / sample_index.folder_name(prefixes, _state_of(config), request)
    folder, reason = _from_first((folder, sample_index.defect(folder, prefixes, values=True) if rank() == 0 else None))
    build = partial(_read_or_build, config, samples, seed, vocab_size)
    if reason is not None:
        _write_index(folder, build)
    elif reason := sample_index.defect(folder, prefixes, values=False):  # on another machine the folder may be another one
        raise ModelLinkError(f"the sample index differs from that of rank 0: {reason}", where=folder,
                             fix="set --data-cache-path to a folder that all machines share")
    sets: list[Any] = build(folder, lambda: True)
    if dist.is_initialized():
        dist.barrier()
    return sets


def _write_index(folder: Path, build: Callable[[Path, Callable[[], bool]], list[Any]]) -> None:
    """Build the sample index on rank 0 in a temporary folder; every rank calls it and waits."""
    with ExitStack() as stack:
        failed, temporary = None, folder
        if rank() == 0:
            try:
                if folder.exists():
                    note(f"the sample index in {folder} is not complete or not valid, and is built again")
                temporary = stack.enter_context(atomic_folder(folder, overwrite=True, wait=True))
                sample_index.remove_outdated(folder)
            except (OSError, ModelLinkError) as error:
                failed = error.strerror if isinstance(error, OSError) else error.what
        if (failed := _from_first(failed)) is not None:
            raise ModelLinkError(f"the sample index cannot be built: {failed}", where=folder,
                                 fix="set --data-cache-path to a writable folder")
        build(temporary, lambda: rank() == 0)
    if dist.is_initialized():
        dist.barrier()


def _read_or_build(config: DataConfig, samples: tuple[int, int, int], seed: int, vocab_size: int, folder: Path,
                   here: Callable[[], bool]) -> list[Any]:
    dataset_config = GPTDatasetConfig(
        random_seed=seed, sequence_length=config.seq_length, blend=config.blend(), split=config.split,
        path_to_cache=str(folder), tokenizer=TokenIds(vocab_size), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False)
    try:
        return list(BlendedMegatronDatasetBuilder(Texts, list(samples), here, dataset_config).build())
    except (IndexError, AssertionError) as error:
        raise ModelLinkError(f"the data has too few tokens for a sample of {config.seq_length} in each part of the split "
                             f"({error})", where="--data-path, --split, --seq-length",
                             fix="use more data, a shorter sequence, or another split") from None


def _from_first(value: T) -> T:
    """The value of rank 0; copies of data on other machines may have other modification times."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def _state_of(config: DataConfig) -> object:
    """What changes with the data, unlike in megatron-core's own fingerprint."""
    return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in config.indexed_files()]


def iteration(dataset: Any, config: DataConfig, *, consumed: int, dp: int, group: Callable[[], dist.ProcessGroup],
              **more: Any) -> Iterator[Batch]:
    """This rank's micro batches of the iteration that starts at sample `consumed`; their loss is a mean over all of its labels.

    Args:
        group: the current data-parallel group.
        more: further arguments of `micro_batches`.
    """
    batches = micro_batches(dataset, config, consumed=consumed, dp=dp, **more)
    return iter(over_global_batch(list(islice(batches, config.num_microbatches(dp, consumed))), dp, group))


def micro_batches(dataset: Any, config: DataConfig, *, consumed: int, dp_rank: int, dp: int, vocab_size: int,
                  device: torch.device) -> Iterator[Batch]:
    """This rank's micro batches, starting with global sample number `consumed`; endless.

    Raises:
        ModelLinkError: a token id is outside the model's vocabulary.
    """
    size = config.micro_batch_size
    while True:
        start = consumed + dp_rank * size
        rows = [dataset[number % len(dataset)] for number in range(start, start + size)]
        tokens, labels, mask = (torch.stack([torch.as_tensor(row[key]) for row in rows])
                                for key in ("tokens", "labels", "loss_mask"))
        largest = max(int(part.numpy().max()) for part in (tokens, labels))
        if largest >= vocab_size:
            raise ModelLinkError(f"token id {largest} is outside the model's vocabulary of {vocab_size}",
                                 where=f"--data-path, sample {start}", fix="tokenize the data with this model's tokenizer")
        batch = Batch(tokens.long(), labels.long(), mask.float())
        if config.eod_mask_loss:
            batch.loss_mask[batch.tokens == config.eod_token_id] = 0.0
        if config.separates_documents:
            assert config.eod_token_id is not None  # prepare has set it
            batch = replace(batch, starts=starts_after(batch.tokens, config.eod_token_id), restart=config.reset_position_ids)
        yield batch.to(device)
        consumed += size * dp
