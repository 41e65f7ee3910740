# SPDX-License-Identifier: Apache-2.0
"""Reading the files of a Megatron checkpoint as torch does."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch


def load_state(path: Path) -> dict[str, Any]:
    """Return the content of a `model_optim_rng.pt`; besides tensors it may hold only the arguments of a run."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)
