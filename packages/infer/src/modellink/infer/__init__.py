# SPDX-License-Identifier: Apache-2.0
"""Text generation, chat and a server, from any checkpoint that modellink-ckpt-convert can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from modellink.infer.engine import Engine, load
    from modellink.infer.request import Generation

__all__ = ["Engine", "Generation", "load"]


def __getattr__(name: str) -> Any:
    """Import lazily: torch takes seconds to import, and help texts do not need it."""
    if name == "Generation":
        from modellink.infer.request import Generation
        return Generation
    if name in __all__:
        from modellink.infer import engine
        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
