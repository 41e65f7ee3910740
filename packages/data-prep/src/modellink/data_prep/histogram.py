"""Lengths as a picture: an SVG of bars, drawn by hand so that nothing has to be installed for it."""

from __future__ import annotations

from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, MARGIN, BARS = 720, 300, 44, 48


def histogram(lengths: NDArray[np.int64], title: str) -> str:
    """Tokens a document, in bars of equal width up to the 99.5th percentile; the last bar holds all longer ones too."""
    lengths = np.asarray(lengths, np.int64)
    top = max(int(np.percentile(lengths, 99.5)), 1) if len(lengths) else 1
    step = max(1, -(-(top + 1) // BARS))
    counts = np.bincount(np.minimum(lengths // step, top // step), minlength=top // step + 1)
    wide, high, most = (WIDTH - 2 * MARGIN) / len(counts), HEIGHT - 2 * MARGIN, max(int(counts.max()), 1)
    bars = []
    for index, count in enumerate(counts.tolist()):
        tall = high * count / most
        last = index == len(counts) - 1
        words = f"{index * step:,} to {'more' if last else f'{(index + 1) * step - 1:,}'} tokens: {count:,}"
        bars.append(f'<rect x="{MARGIN + index * wide:.1f}" y="{HEIGHT - MARGIN - tall:.1f}" width="{max(wide - 1, 1):.1f}" '
                    f'height="{tall:.1f}"><title>{words}</title></rect>')
    marks = [_text(MARGIN + share * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN + 16, f"{round(share * len(counts) * step):,}")
             for share in (0, 0.25, 0.5, 0.75, 1)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', _text(WIDTH / 2, 22, escape(title)),
        _text(WIDTH / 2, HEIGHT - 8, "tokens a document"), _text(MARGIN, MARGIN - 6, f"{most:,}"),
        f'<path d="M {MARGIN} {HEIGHT - MARGIN} H {WIDTH - MARGIN}" stroke="black"/>', '<g fill="#4477aa">', *bars, "</g>",
        *marks, "</svg>", ""])


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{words}</text>'
