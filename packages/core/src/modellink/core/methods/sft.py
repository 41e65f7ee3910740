# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: the mean cross-entropy of the tokens of assistant messages in instruction data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.core.config import DataConfig
from modellink.core.config.data import INSTRUCTION_FIELDS
from modellink.core.methods.pretrain import Pretrain
from modellink.core.train.method import Feed, Feeds, Method
from modellink.kernels.errors import ModelLinkError

if TYPE_CHECKING:
    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core.data.instruction import Sample
    from modellink.core.data.mixture import Samples
    from modellink.core.train.training import Training


class Sft(Pretrain):
    """The loss of pretraining over the labels of instruction data, normalized over the global batch."""

    name = "sft"
    summary = "Fine-tune on instruction data; the loss is the mean over the tokens of assistant messages."

    @classmethod
    def for_data(cls, data: DataConfig) -> type[Method]:
        return cls

    @classmethod
    def data_files(cls, data: DataConfig) -> list[Path]:
        return [Path(f"{prefix}_packed_{field}_document{suffix}") for prefix in data.blend()[0]
                for field in INSTRUCTION_FIELDS for suffix in (".idx", ".bin")]

    @classmethod
    def complete_data(cls, data: DataConfig, spec: ModelSpec, companions: Path | None) -> DataConfig:
        return replace(data, is_instruction_dataset=True)  # the original's name for what `sft` implies

    def check(self) -> None:
        data = self.run.data
        for flag, given in (("--reset-attention-mask", data.reset_attention_mask), ("--eod-mask-loss", data.eod_mask_loss)):
            if given:
                raise ModelLinkError("the labels and masks of instruction data already define loss and sample boundaries",
                                     where=flag, fix="remove it; --reset-position-ids separates the samples of a packed row")

    def open_data(self) -> None:
        from modellink.core.data.instruction import build_sets
        self._sets = build_sets(self.run.data, self.run.instruction, seed=self.run.optimizer.seed)

    def feeds(self, training: Training) -> Feeds:
        from megatron.core import parallel_state

        from modellink.core.data.instruction import iteration
        run = self.run

        def feed(share: Samples[Sample] | None, data: DataConfig) -> Feed | None:
            if share is None:
                return None
            return partial(iteration, share, data, run.instruction, dp_rank=parallel_state.get_data_parallel_rank(),
                           dp=run.layout.dp, multiple=run.sequence_multiple, vocab_size=run.spec.vocab_size,
                           device=run.device.torch, group=parallel_state.get_data_parallel_group)

        evaluated = replace(run.data, rampup_batch_size=None)  # evaluation batches have full size during the ramp-up
        train, valid, test = map(feed, self._sets, (run.data, evaluated, evaluated))
        assert train is not None
        return Feeds(train, valid, test)
