# SPDX-License-Identifier: Apache-2.0
"""Facts about the device that is checked, found in the process on it."""

from __future__ import annotations

import platform
from typing import Any


def device_facts() -> dict[str, Any]:
    """On a rank: kind and name of the device, its memory in bytes, and versions."""
    import torch

    from modellink.core import engine

    device = engine.current_device()
    facts: dict[str, Any] = {
        "kind": device.type, "name": platform.processor() or platform.machine(), "memory": 0,
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory": properties.total_memory,
                  "capability": list(torch.cuda.get_device_capability(device))}
    return facts
