# SPDX-License-Identifier: Apache-2.0
"""A rank on the simulated device, for `ranks.Ranks`; or a command there: `rank.py MODULE FUNCTION arguments`."""

from __future__ import annotations

import importlib
import os
import sys

import device

if __name__ == "__main__":
    device.load(int(os.environ.get("WORLD_SIZE", "1")))
    device.kernels()
    device.operators()
    device.collectives()
    device.forbid_cuda()
    if sys.argv[1:]:
        _, module, function, *arguments = sys.argv
        sys.argv = [module, *arguments]
        getattr(importlib.import_module(module), function)()
    else:
        from ranks import serve
        serve("npu")
