# SPDX-License-Identifier: Apache-2.0
"""The frame and the text of an SVG picture, for charts that are written without a plotting library.

Not here: what a chart shows; the modules that draw one compute their own shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Literal


def picture(width: int, height: int, parts: Iterable[str]) -> str:
    """Return an SVG document of `width` x `height` pixels with a white background and the elements `parts` on it."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def text(x: float, y: float, words: str, *, anchor: Literal["start", "middle", "end"] = "middle", size: int = 12) -> str:
    """Return a text element; `words` is escaped."""
    font = "" if size == 12 else f' font-size="{size}"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{font}>{escape(words)}</text>'
