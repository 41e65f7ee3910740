"""The same bits from the same run (`--use-deter-comp`): what torch, the accelerator and its collectives are asked for.

Random numbers need nothing more: weights, dropout and the order of data come from --seed in every run. Not here: showing where
two runs part (digests.py).
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

VARIABLES = {
    # torch.use_deterministic_algorithms wants the first; of the second Megatron-LM's deterministic mode says which algorithms
    # sum in one order
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"},
    # sums of HCCL in one order, and products whose inner dimension is not shifted
    "npu": {"HCCL_DETERMINISTIC": "True", "CLOSE_MATMUL_K_SHIFT": "1"}}


def set_variables(kind: str) -> None:
    """Set what the libraries of a kind of device read when they start, where the user has not; ranks started later inherit it."""
    for name, value in VARIABLES.get(kind, {}).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def deterministic(on: bool, seed: int) -> Iterator[None]:
    """Inside, with `on`, an operation gives the same bits for the same input, or raises RuntimeError where it cannot."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    random.seed(seed)
    np.random.seed(seed)  # of libraries that draw from it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
