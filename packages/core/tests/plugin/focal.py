# SPDX-License-Identifier: Apache-2.0
"""Two training methods of a third party, with their own options, data, loss and metrics; tests put this folder on PYTHONPATH."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modellink.core import Feeds, Method, Run
from modellink.core.data.batch import Batch
from modellink.kernels.options import option


@dataclass(frozen=True)
class FocalConfig:
    heading: ClassVar[str] = "Focal loss"

    sequences: Path = option(doc="JSON file with a list of lists of token ids.")
    gamma: float = option(2.0, "Weight a token by (1 - its probability) ** gamma.", minimum=0)


class Focal(Method):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002, equation 4) of next tokens."""

    name = "focal"
    summary = "Pretrain with focal loss."
    options = FocalConfig
    metrics = ("loss", "mean-weight")

    @classmethod
    def data_files(cls, data: Any) -> list[Path]:
        return []

    def feeds(self, training: Any) -> Feeds:
        rows = json.loads(self.run.options.sequences.read_text())
        return Feeds(partial(batches, self.run, torch.tensor(rows)))

    def loss(self, batch: Any, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        from modellink.core.train.losses import masked_mean, token_losses
        losses = token_losses(batch, output)
        weights = (1 - torch.exp(-losses)) ** self.run.options.gamma
        loss, reported = masked_mean(batch, weights * losses)
        return loss, {"loss": reported, "mean-weight": masked_mean(batch, weights.detach())[1]}


def batches(run: Run, rows: Tensor, *, consumed: int) -> Iterator[Any]:
    """This rank's micro batches of consecutive rows, again from the first after the last."""
    from megatron.core import parallel_state
    size, rank = run.data.micro_batch_size, parallel_state.get_data_parallel_rank()
    while True:
        start = consumed + rank * size
        part = rows[torch.arange(start, start + size) % len(rows)]
        yield Batch(part[:, :-1], part[:, 1:], torch.ones(part[:, 1:].shape)).to(run.device.torch)
        consumed += size * run.layout.dp


@dataclass(frozen=True)
class WithReference(Batch):
    """A batch with the cross-entropy [micro batch, seq] that the reference model gives each label."""

    reference: Tensor | None = None


class Anchored(Focal):
    """Cross-entropy plus the mean squared difference of each token's log-probability from that of a reference model."""

    name = "anchored"
    summary = "Pretrain and stay near a reference model."
    metrics = ("loss", "distance")
    needs_reference = True

    def feeds(self, training: Any) -> Feeds:
        plain = super().feeds(training).train
        return Feeds(partial(self._with_reference, plain, training))

    def _with_reference(self, plain: Any, training: Any, *, consumed: int) -> Iterator[Any]:
        from modellink.core.train.losses import token_losses
        from modellink.core.train.step import forward, forward_outputs
        data = self.run.data
        count, iterator = data.num_microbatches(self.run.layout.dp), plain(consumed=consumed)
        taken = [next(iterator) for _ in range(count)]

        def losses(source: Iterator[Batch], model: Any) -> Any:
            batch = next(source)
            return forward(model, batch), partial(token_losses, batch)
        found = forward_outputs(losses, training.reference, lambda: iter(taken), num_microbatches=count,
                                seq_length=data.seq_length, micro_batch_size=data.micro_batch_size)
        known = found or [None] * count  # only the last stage needs them
        return iter([WithReference(**vars(batch), reference=values) for batch, values in zip(taken, known, strict=True)])

    def loss(self, batch: Any, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        from modellink.core.train.losses import masked_mean, token_losses
        losses = token_losses(batch, output)
        distances = (losses - batch.reference) ** 2
        loss, reported = masked_mean(batch, losses + distances)
        return loss, {"loss": reported, "distance": masked_mean(batch, distances.detach())[1]}
