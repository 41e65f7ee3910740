# SPDX-License-Identifier: Apache-2.0
"""An SVG histogram of document lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modellink.kernels.svg import picture, text

WIDTH, HEIGHT, MARGIN, BARS = 720, 300, 44, 48


def histogram(lengths: NDArray[np.int64], title: str) -> str:
    """Draw the number of documents by their length in tokens.

    All bars cover the same range of lengths, up to the 99.5th percentile; the last bar also counts all longer documents.
    """
    lengths = np.asarray(lengths, np.int64)
    top = max(int(np.percentile(lengths, 99.5)), 1) if len(lengths) else 1
    step = max(1, -(-(top + 1) // BARS))
    counts = np.bincount(np.minimum(lengths // step, top // step), minlength=top // step + 1)
    width, height, most = (WIDTH - 2 * MARGIN) / len(counts), HEIGHT - 2 * MARGIN, max(int(counts.max()), 1)
    bars = []
    for index, count in enumerate(counts.tolist()):
        tall = height * count / most
        end = "more" if index == len(counts) - 1 else f"{(index + 1) * step - 1:,}"
        bars.append(f'<rect x="{MARGIN + index * width:.1f}" y="{HEIGHT - MARGIN - tall:.1f}" width="{max(width - 1, 1):.1f}" '
                    f'height="{tall:.1f}"><title>{index * step:,} to {end} tokens: {count:,}</title></rect>')
    marks = [text(MARGIN + share * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN + 16, f"{round(share * len(counts) * step):,}")
             for share in (0, 0.25, 0.5, 0.75, 1)]
    return picture(WIDTH, HEIGHT, [
        text(WIDTH / 2, 22, title), text(WIDTH / 2, HEIGHT - 8, "tokens per document"), text(MARGIN, MARGIN - 6, f"{most:,}"),
        f'<path d="M {MARGIN} {HEIGHT - MARGIN} H {WIDTH - MARGIN}" stroke="black"/>', '<g fill="#4477aa">', *bars, "</g>",
        *marks])
