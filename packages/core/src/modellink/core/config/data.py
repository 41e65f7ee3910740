# SPDX-License-Identifier: Apache-2.0
"""Training data and batch sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import option

INSTRUCTION_FIELDS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class DataConfig:
    heading: ClassVar[str] = "Data"

    data_path: tuple[str, ...] = option((), "Prefix of a .bin/.idx pair, or alternating weights and prefixes for a blend.")
    is_instruction_dataset: bool = option(False, "The data is instruction data: `pretrain` with this option is `sft`.")
    split: str = option("969,30,1", "Ratio of training, validation and test data.")
    seq_length: int = option(4096, "Sequence length.", unit="tokens", minimum=1)
    micro_batch_size: int = option(1, "Samples per forward pass on one rank.", minimum=1)
    global_batch_size: int | None = option(
        None, "Global batch size in samples. Default: micro batch size x DP.", minimum=1)
    rampup_batch_size: tuple[int, ...] | None = option(
        None, "START,INCREMENT,SAMPLES: grow the global batch from START by INCREMENT, reaching the full size after SAMPLES "
        "samples.")
    reset_position_ids: bool = option(
        False, "Restart positions at each document of a sample, and keep attention within documents.")
    reset_attention_mask: bool = option(False, "Keep attention within documents; positions do not restart.")
    eod_mask_loss: bool = option(False, "Exclude the token after each end of document from the loss, which is the mean over "
                                 "the other tokens of the global batch.")
    eod_token_id: int | None = option(
        None, "Token that ends a document. Default: eos_token_id of the model's config.json.", minimum=0)
    data_cache_path: Path | None = option(None, "Folder for the sample index. Default: `cache` next to the data.")

    @property
    def separates_documents(self) -> bool:
        """Whether attention stays within documents."""
        return self.reset_position_ids or self.reset_attention_mask

    def blend(self) -> tuple[list[str], list[float] | None]:
        """The prefixes, and their weights if they are given.

        Raises:
            ModelLinkError: no prefix, or something else than weights and prefixes in turn.
        """
        if not self.data_path:
            raise ModelLinkError("--data-path is not set", where="--data-path",
                                 fix="make data with modellink-preprocess, and give the prefix that it prints")
        if len(self.data_path) == 1:
            return list(self.data_path), None
        try:
            weights = [float(weight) for weight in self.data_path[::2]]
            if len(self.data_path) % 2 or not all(0 < weight < math.inf for weight in weights):
                raise ValueError
            return list(self.data_path[1::2]), weights
        except ValueError:
            given = " ".join(self.data_path)
            raise ModelLinkError(f"{given} is not a list of alternating weights and prefixes", where="--data-path",
                                 fix="e.g. --data-path 0.3 first_text_document 0.7 second_text_document") from None

    def indexed_files(self) -> list[Path]:
        """The .idx and .bin files under the prefixes."""
        return [Path(prefix + suffix) for prefix in self.blend()[0] for suffix in (".idx", ".bin")]

    def num_microbatches(self, dp: int, consumed: int | None = None) -> int:
        """Micro batches per rank in the iteration that starts at sample `consumed`. Default: after the ramp-up."""
        per_pass = self.micro_batch_size * dp
        total = self.global_batch_size or per_pass
        if total % per_pass:
            raise ModelLinkError(f"global batch size {total} is not a multiple of micro batch size {self.micro_batch_size} "
                                 f"x data parallel size {dp}", where="--global-batch-size")
        return (total if consumed is None else self.batch_size_at(consumed, dp)) // per_pass

    def samples_per_iteration(self, dp: int) -> int:
        """The global batch size after the ramp-up."""
        return self.num_microbatches(dp) * self.micro_batch_size * dp

    def batch_size_at(self, consumed: int, dp: int) -> int:
        """The global batch size of the iteration that starts at sample `consumed`."""
        whole = self.samples_per_iteration(dp)
        if self.rampup_batch_size is None:
            return whole
        start, step, samples = self.rampup_batch_size
        return min(whole, start + step * (consumed * (whole - start) // (samples * step)))

    def samples_of(self, iterations: int, dp: int, consumed: int = 0) -> int:
        """Samples consumed after `iterations` more iterations."""
        whole = self.samples_per_iteration(dp)
        while iterations and (size := self.batch_size_at(consumed, dp)) < whole:
            consumed, iterations = consumed + size, iterations - 1
        return consumed + iterations * whole

    def iterations_of(self, samples: int, dp: int, *, done: int = 0, consumed: int = 0) -> int:
        """Total iterations of a run of `samples` samples, `done` of which have consumed the first `consumed`.

        Raises:
            ModelLinkError: fewer samples than one global batch.
        """
        iterations, whole = done, self.samples_per_iteration(dp)
        while (size := self.batch_size_at(consumed, dp)) < whole and consumed + size <= samples:
            consumed, iterations = consumed + size, iterations + 1
        if not (total := iterations + max(0, samples - consumed) // whole):
            raise ModelLinkError(f"{samples} samples are fewer than one global batch of {size}",
                                 where="--train-samples, --global-batch-size")
        return total

    def check_rampup(self, dp: int, passes: int = 1) -> None:
        """Raise ModelLinkError if a global batch of the ramp-up cannot be split across the ranks.

        Args:
            passes: the number of micro batches per rank must be a multiple of this.
        """
        if self.rampup_batch_size is None:
            return
        whole, unit = self.samples_per_iteration(dp), self.micro_batch_size * dp * passes
        if len(self.rampup_batch_size) != 3:
            raise ModelLinkError(f"--rampup-batch-size takes three numbers, not {len(self.rampup_batch_size)}",
                                 where="--rampup-batch-size", fix="give START,INCREMENT,SAMPLES, e.g. 16,16,30000")
        start, step, samples = self.rampup_batch_size
        if min(start, step, samples) < 1 or start % unit or step % unit or start > whole or (whole - start) % step:
            raise ModelLinkError(f"a global batch that starts at {start} and grows by {step} does not reach {whole} in "
                                 f"multiples of {unit} (micro batch size x DP x stages if interleaved)",
                                 where="--rampup-batch-size, --global-batch-size",
                                 fix=f"use multiples of {unit} whose steps end at {whole}")

    def check(self) -> None:
        try:
            shares = [float(share) for share in self.split.split(",")]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or shares[0] == 0:
            raise ModelLinkError(f"{self.split!r} is not a ratio of at most three numbers, the first above 0", where="--split",
                                 fix="e.g. --split 969,30,1")
