"""Supervised fine-tuning from beginning to end: what `modellink-train sft` does on every rank."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron.core import parallel_state

from modellink.core.config import DataConfig
from modellink.core.data.instruction import Sample, build_sets, iteration
from modellink.core.data.mixture import Samples
from modellink.core.determinism import deterministic
from modellink.core.run import Run
from modellink.core.train.loop import Feed, loop
from modellink.core.train.metrics import Step
from modellink.core.train.setup import set_up
from modellink.kernels.ops import plain_forms


def sft(run: Run) -> list[Step]:
    """Train until the last iteration or --exit-interval; as `pretrain`, on instruction data."""
    with plain_forms(*run.fused.plain_ops), deterministic(run.determinism.use_deter_comp, run.optimizer.seed):
        return _sft(run)


def _sft(run: Run) -> list[Step]:
    sets = build_sets(run.data, run.instruction, seed=run.optimizer.seed)
    training = set_up(run)

    def feed(share: Samples[Sample] | None, data: DataConfig) -> Feed | None:
        return None if share is None else partial(
            iteration, share, data, run.instruction, dp_rank=parallel_state.get_data_parallel_rank(), dp=run.layout.dp,
            multiple=run.sequence_multiple, vocab_size=run.spec.vocab_size, device=run.device.torch,
            group=parallel_state.get_data_parallel_group)

    evaluated = replace(run.data, rampup_batch_size=None)  # whole batches, however small those of training still are
    train, valid, test = map(feed, sets, (run.data, evaluated, evaluated))
    assert train is not None
    return loop(run, training, train, valid, test)
