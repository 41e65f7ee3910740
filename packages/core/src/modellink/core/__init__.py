# SPDX-License-Identifier: Apache-2.0
"""Training of large language models on megatron-core.

    from modellink.core import Callback, Method, Run, Step, fit

Importing this package imports neither torch nor megatron; they are imported when a run starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modellink.core.api import fit
    from modellink.core.run import Run
    from modellink.core.train.callbacks import Callback
    from modellink.core.train.history import Step
    from modellink.core.train.method import Feeds, Method

__version__ = "0.1.0"
__all__ = ["Callback", "Feeds", "Method", "Run", "Step", "fit"]

_HOMES = {"Callback": "train.callbacks", "Feeds": "train.method", "Method": "train.method", "Run": "run",
          "Step": "train.history", "fit": "api"}
"""Exported name -> the module it is defined in."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
