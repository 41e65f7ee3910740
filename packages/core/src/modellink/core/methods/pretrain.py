# SPDX-License-Identifier: Apache-2.0
"""Pretraining: cross-entropy of every next token of the documents in .bin/.idx files."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.core.config import DataConfig
from modellink.core.train.method import Feed, Feeds, Method, find_method
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    from torch import Tensor

    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core.data.batch import Batch
    from modellink.core.train.training import Training


class Pretrain(Method):
    name = "pretrain"
    summary = "Pretrain on .bin/.idx data from random weights or a checkpoint, or resume a run."

    @classmethod
    def for_data(cls, data: DataConfig) -> type[Method]:
        if cls is Pretrain and data.is_instruction_dataset:
            return find_method("sft")
        return super().for_data(data)

    @classmethod
    def complete_data(cls, data: DataConfig, spec: ModelSpec, companions: Path | None) -> DataConfig:
        """Fill in the end-of-document token if attention or loss depend on document boundaries."""
        if not (data.separates_documents or data.eod_mask_loss):
            return data
        return replace(data, eod_token_id=end_of_document(data, companions, spec.vocab_size))

    def feeds(self, training: Training) -> Feeds:
        from megatron.core import parallel_state

        from modellink.core.data.pretrain import build_datasets, extended, iteration, micro_batches
        run, config = self.run, self.run.data
        left = max(0, run.optimizer.train_iters - training.iteration)
        trained = config.samples_of(left, run.layout.dp, training.consumed_samples)
        evaluated = run.logging.eval_iters * config.samples_per_iteration(run.layout.dp)
        training.ordered = extended(training.ordered, trained)
        sets = build_datasets(config, seed=run.optimizer.seed, vocab_size=run.spec.vocab_size, trained=training.ordered,
                              evaluated=evaluated)

        def feed(dataset: Any, config: DataConfig) -> Feed | None:
            if dataset is None:
                return None
            where = {"dp_rank": parallel_state.get_data_parallel_rank(), "dp": run.layout.dp,
                     "vocab_size": run.spec.vocab_size, "device": run.device.torch}
            if not config.eod_mask_loss:  # then every micro batch has the same number of labels
                return partial(micro_batches, dataset, config, **where)
            return partial(iteration, dataset, config, group=parallel_state.get_data_parallel_group, **where)

        evaluated_at_full_size = replace(config, rampup_batch_size=None)
        train, valid, test = map(feed, sets, (config, evaluated_at_full_size, evaluated_at_full_size))
        assert train is not None
        return Feeds(train, valid, test)

    def loss(self, batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        from modellink.core.train.losses import masked_mean, token_losses
        loss, reported = masked_mean(batch, token_losses(batch, output))
        return loss, {"loss": reported}


def end_of_document(data: DataConfig, companions: Path | None, vocab_size: int) -> int:
    """The token id that ends a document: --eod-token-id, or eos_token_id of the model's config.json.

    Raises:
        ModelLinkError: neither is a single id of the vocabulary.
    """
    known: object = data.eod_token_id
    if known is None and companions is not None and (companions / "config.json").is_file():
        known = json.loads((companions / "config.json").read_text("utf-8")).get("eos_token_id")
    if isinstance(known, int) and known < vocab_size:
        return known
    if known is None:
        found = "unknown"
    elif isinstance(known, int):
        found = f"{known}, outside the vocabulary of {vocab_size}"
    else:
        found = f"ambiguous: the model's config.json lists {known}"
    raise ModelLinkError(f"documents must be separated, but the end-of-document token is {found}", where="--eod-token-id",
                         fix="give the id of the tokenizer's end of text")
