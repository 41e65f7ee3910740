# SPDX-License-Identifier: Apache-2.0
"""Warnings of dependencies that a user cannot act on: which ones are not shown, and why.

Each is named by its text and the module that it is attributed to; every other warning is shown. Called by every command
(`run_command`) and by core before it imports megatron-core.
"""

from __future__ import annotations

import warnings

IGNORED: tuple[tuple[str, type[Warning], str], ...] = (
    # megatron-core calls functions that torch has renamed since
    (r"`(torch\.distributed\.\w+|load_state_dict)` is deprecated", FutureWarning, r"(megatron\.core|torch\.distributed)\."),
    # torch's distributed checkpointing looks at attributes of the sharded tensors that megatron-core gives it
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning, r"torch\.distributed\."),
    # reading a checkpoint in one process is what is meant
    (r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
     UserWarning, r"torch\.distributed\.checkpoint\."),
    # its distributed optimizer looks at `.grad` of views of parameters
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning, r"megatron\.core\.optimizer"),
    # every module of megatron-core warns at import; we use neither
    (r"(Transformer Engine and )?Apex (are|is) not installed", UserWarning, r"megatron\.core\."),
    (r"If you are using transformer_engine", UserWarning, r"megatron\.core\."),  # of selective recomputation
)
"""(start of the text, category, start of the module's name), as regular expressions."""


def ignore() -> None:
    """Do not show these warnings in this process."""
    for message, category, module in IGNORED:
        warnings.filterwarnings("ignore", message, category, module)
