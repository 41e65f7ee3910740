# SPDX-License-Identifier: Apache-2.0
"""Bit-identical repetition of a run (`--use-deter-comp`): settings of torch, the accelerator and its collectives.

Random numbers need no further settings: weights, dropout and data order always come from --seed. Not here: showing where two runs
diverge (digests.py).
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

VARIABLES = {
    # torch.use_deterministic_algorithms needs the first; the second selects a collective algorithm with a fixed order of
    # summation, as in Megatron-LM's deterministic mode
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"},
    # fixed order of summation in HCCL, and no shifting of the inner dimension of products
    "npu": {"HCCL_DETERMINISTIC": "True", "CLOSE_MATMUL_K_SHIFT": "1"}}


def set_variables(kind: str) -> None:
    """Set environment variables for the libraries of a device unless the user has; ranks started later inherit them."""
    for name, value in VARIABLES.get(kind, {}).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def deterministic(on: bool, seed: int) -> Iterator[None]:
    """Within the context, if `on`, operations are deterministic or raise RuntimeError."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    random.seed(seed)
    np.random.seed(seed)  # for libraries that use it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
