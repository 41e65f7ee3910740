# SPDX-License-Identifier: Apache-2.0
"""The random generators of a rank: the host's, the device's, and megatron-core's named ones for parallel layers."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Copies of the generator states by name, as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state(device)
    return states | {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    named = dict(state)
    torch.set_rng_state(named.pop("cpu"))
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(named.pop(device.type), device)
    get_cuda_rng_tracker().set_states({name: value.clone() for name, value in named.items()})
