# SPDX-License-Identifier: Apache-2.0
"""How instruction data is batched: padding, order and template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modellink.kernels.options import option


@dataclass(frozen=True)
class InstructionConfig:
    heading: ClassVar[str] = "Instruction data"

    variable_seq_lengths: bool = option(False, "Pad to the longest sample of each micro batch instead of --seq-length.")
    pad_to_multiple_of: int = option(8, "With --variable-seq-lengths: pad to a multiple of this.", unit="tokens",
                                     minimum=1)
    shuffle: bool = option(True, "Shuffle the samples, differently in every epoch.")
    prompt_type: str | None = option(None, "Chat template of the data; saved in the checkpoints, so that chat uses the same.")
