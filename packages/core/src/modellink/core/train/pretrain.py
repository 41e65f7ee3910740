"""Pretraining from beginning to end: what `modellink-train pretrain` does on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core import parallel_state

from modellink.core.data.pretrain import build_datasets, extended, micro_batches
from modellink.core.determinism import deterministic
from modellink.core.run import Run
from modellink.core.train.loop import Feed, loop
from modellink.core.train.metrics import Step
from modellink.core.train.setup import set_up
from modellink.kernels.ops import plain_forms


def pretrain(run: Run) -> list[Step]:
    """Train until the last iteration or --exit-interval; every rank of the layout calls it, with the process groups made.

    Returns:
        The finished steps, those before a resume too, on the last rank; nothing elsewhere.
    """
    with plain_forms(*run.fused.plain_ops), deterministic(run.determinism.use_deter_comp, run.optimizer.seed):
        return _pretrain(run)


def _pretrain(run: Run) -> list[Step]:
    training = set_up(run)
    config, logging = run.data, run.logging
    left = max(0, run.optimizer.train_iters - training.iteration)
    trained = config.samples_of(left, run.layout.dp, training.consumed_samples)
    evaluated = logging.eval_iters * config.samples_per_iteration(run.layout.dp)
    training.ordered = extended(training.ordered, trained)
    sets = build_datasets(config, seed=run.optimizer.seed, vocab_size=run.spec.vocab_size, trained=training.ordered,
                          evaluated=evaluated)

    def feed(dataset: Any) -> Feed | None:
        return None if dataset is None else partial(
            micro_batches, dataset, config, dp_rank=parallel_state.get_data_parallel_rank(), dp=run.layout.dp,
            vocab_size=run.spec.vocab_size, device=run.device.torch)

    train, valid, test = map(feed, sets)
    assert train is not None
    return loop(run, training, train, valid, test)
