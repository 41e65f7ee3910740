"""What a run reads."""

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
    section: ClassVar[str] = "data"

    data_path: tuple[str, ...] = option((), "Prefix of a .bin/.idx pair, or weight and prefix in turn for a blend.")
    is_instruction_dataset: bool = option(False, "The prefixes are of instruction data; `sft` is `pretrain` with this.")
    split: str = option("969,30,1", "Shares of training, validation and test.")
    seq_length: int = option(4096, "Tokens of a sample.", unit="tokens", minimum=1)
    micro_batch_size: int = option(1, "Samples of one forward pass on one rank.", minimum=1)
    global_batch_size: int | None = option(None, "Samples of one iteration over all ranks; micro batch x DP where nothing "
                                           "is said.", minimum=1)
    rampup_batch_size: tuple[int, ...] | None = option(
        None, "Begin with a global batch of the first number, and add the second again and again until the third number of "
        "samples, when it is whole.")
    reset_position_ids: bool = option(False, "Count positions from the beginning of each document of a sample, and let no token "
                                      "see another document.")
    reset_attention_mask: bool = option(False, "Let no token see another document, with positions of the sample.")
    eod_mask_loss: bool = option(False, "Do not learn what follows an end of document.")
    eod_token_id: int | None = option(None, "The token that ends a document; eos_token_id of the model's config.json where "
                                      "nothing is said.", minimum=0)
    data_cache_path: Path | None = option(None, "Folder of the sample index; beside the data where nothing is said.")

    @property
    def separates_documents(self) -> bool:
        """Whether attention keeps to a document."""
        return self.reset_position_ids or self.reset_attention_mask

    def blend(self) -> tuple[list[str], list[float] | None]:
        """The prefixes, and their weights where they were given."""
        if len(self.data_path) == 1:
            return list(self.data_path), None
        try:
            weights = [float(weight) for weight in self.data_path[::2]]
            if len(self.data_path) % 2 or not all(0 < weight < math.inf for weight in weights):
                raise ValueError
            return list(self.data_path[1::2]), weights
        except ValueError:
            raise ModelLinkError(f"{' '.join(self.data_path)} is not weight and prefix in turn", where="--data-path",
                                 fix="e.g. --data-path 0.3 first_text_document 0.7 second_text_document") from None

    def indexed_files(self) -> list[Path]:
        """The .idx and .bin files under the prefixes."""
        return [Path(prefix + suffix) for prefix in self.blend()[0] for suffix in (".idx", ".bin")]

    def num_microbatches(self, dp: int, consumed: int | None = None) -> int:
        """Forward passes on each rank of the iteration that begins with sample `consumed`; None: of one past the ramp-up."""
        per_pass = self.micro_batch_size * dp
        total = self.global_batch_size or per_pass
        if total % per_pass:
            raise ModelLinkError(f"global batch size {total} is not a multiple of micro batch size {self.micro_batch_size} "
                                 f"x data parallel size {dp}", where="--global-batch-size")
        return (total if consumed is None else self.batch_size_at(consumed, dp)) // per_pass

    def samples_per_iteration(self, dp: int) -> int:
        """The global batch size, past the ramp-up."""
        return self.num_microbatches(dp) * self.micro_batch_size * dp

    def batch_size_at(self, consumed: int, dp: int) -> int:
        """The global batch size of the iteration that begins with sample `consumed`."""
        whole = self.samples_per_iteration(dp)
        if self.rampup_batch_size is None:
            return whole
        start, step, samples = self.rampup_batch_size
        return min(whole, start + step * (consumed * (whole - start) // (samples * step)))

    def samples_of(self, iterations: int, dp: int, consumed: int = 0) -> int:
        """The samples of a run after so many more iterations."""
        whole = self.samples_per_iteration(dp)
        while iterations and (size := self.batch_size_at(consumed, dp)) < whole:
            consumed, iterations = consumed + size, iterations - 1
        return consumed + iterations * whole

    def iterations_of(self, samples: int, dp: int, *, done: int = 0, consumed: int = 0) -> int:
        """The whole iterations that so many samples give, `done` of which have taken the first `consumed`.

        Raises:
            ModelLinkError: there is none.
        """
        iterations, whole = done, self.samples_per_iteration(dp)
        while (size := self.batch_size_at(consumed, dp)) < whole and consumed + size <= samples:
            consumed, iterations = consumed + size, iterations + 1
        if not (total := iterations + max(0, samples - consumed) // whole):
            raise ModelLinkError(f"{samples} samples are less than one global batch of {size}",
                                 where="--train-samples, --global-batch-size")
        return total

    def check_rampup(self, dp: int, passes: int = 1) -> None:
        """Raise where the ramp-up has a global batch that the ranks cannot divide.

        Args:
            passes: what the number of micro batches of a rank must be a multiple of.
        """
        if self.rampup_batch_size is None:
            return
        whole, unit = self.samples_per_iteration(dp), self.micro_batch_size * dp * passes
        if len(self.rampup_batch_size) != 3:
            raise ModelLinkError(f"a ramp-up is three numbers, not {len(self.rampup_batch_size)}", where="--rampup-batch-size",
                                 fix="give first batch, increment and samples, e.g. 16,16,30000")
        start, step, samples = self.rampup_batch_size
        if min(start, step, samples) < 1 or start % unit or step % unit or start > whole or (whole - start) % step:
            raise ModelLinkError(f"a batch that begins with {start} and grows by {step} does not reach {whole} in multiples of "
                                 f"{unit}, what all ranks take together", where="--rampup-batch-size, --global-batch-size",
                                 fix=f"use multiples of {unit} whose steps end at {whole}")

    def check(self) -> None:
        if not self.data_path:
            raise ModelLinkError("there is no data", where="--data-path",
                                 fix="make some with modellink-preprocess, and give its output prefix with _text_document")
        try:
            shares = [float(share) for share in self.split.split(",")]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
            raise ModelLinkError(f"{self.split!r} is not three shares", where="--split", fix="e.g. --split 969,30,1")
