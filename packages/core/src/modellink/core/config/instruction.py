"""How instruction data is read: padding, order, samples that share a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modellink.kernels.options import option


@dataclass(frozen=True)
class InstructionConfig:
    section: ClassVar[str] = "instruction"

    variable_seq_lengths: bool = option(False, "Pad to the longest sample of a micro batch, not to --seq-length.")
    pad_to_multiple_of: int = option(8, "With --variable-seq-lengths: round that up to a multiple of this.", unit="tokens",
                                     minimum=1)
    shuffle: bool = option(True, "Mix the samples, every epoch anew.")
    prompt_type: str | None = option(None, "Template the data was made with; noted in the checkpoints, where chat finds it.")
