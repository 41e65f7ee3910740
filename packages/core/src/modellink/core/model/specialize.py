# SPDX-License-Identifier: Apache-2.0
"""Changes the class of an object that megatron-core has built, in place. The only place that does so.

megatron-core builds linears, optimizers and dispatchers itself and keeps references to them, so an object with more behavior
must be the same object. Steps that change a model run in one order (train/setup.py).
"""

from __future__ import annotations

from typing import Any

from modellink.kernels.errors import InternalError


def specialize(built: Any, kind: Any) -> None:
    """Turn `built` into an instance of `kind`, a subclass of its present class, which adds methods and shares its state."""
    if not issubclass(kind, type(built)):
        raise InternalError(f"{kind.__name__} is not a subclass of {type(built).__name__}")
    built.__class__ = kind
