# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modellink.kernels.svg import picture, text

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 64, 56, 20, 44
LEGEND = 150  # pixels between two names of the legend
MARKED = 30  # points of a line up to which each is marked by a circle; a single one has no line
COLORS = ("#1f6feb", "#b35900", "#1a7f37", "#8250df")


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, about `wanted` of them, in steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / wanted))
    step = next(power * size for size in (1, 2, 5, 10) if span / (power * size) <= wanted)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_losses(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str | None:
    """Return the SVG document of loss curves over iterations, by name; None if there are not two points.

    Points that are not finite are left out, and long lines are thinned to what the picture can show.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    shown = {name: thin(points) for name, points in finite.items() if points}
    if sum(map(len, shown.values())) < 2:
        return None
    return draw_lines(shown, title="lm loss", x="iteration")


def thin(points: Sequence[tuple[float, float]], most: int = 2 * (WIDTH - LEFT - RIGHT)) -> list[tuple[float, float]]:
    """Return about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    size = math.ceil(2 * len(points) / most)
    if size <= 2:
        return list(points)
    stretches = [points[start:start + size] for start in range(0, len(points), size)]
    kept = {extreme for stretch in stretches for extreme in (min(stretch, key=_y), max(stretch, key=_y))}
    return sorted(kept | {points[0], points[-1]})


def _y(point: tuple[float, float]) -> float:
    return point[1]


def draw_lines(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str) -> str:
    """Draw several named lines in different colors; every second one is dashed, so that it shows on top of the one before."""
    xs, ys = ([point[axis] for points in lines.values() for point in points] for axis in (0, 1))
    margin = 0.05 * ((max(ys) - min(ys)) or 1.0)
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys) - margin, max(ys) + margin

    def place(px: float, py: float) -> tuple[float, float]:
        across = (px - low_x) / ((high_x - low_x) or 1.0) * (WIDTH - LEFT - RIGHT)
        up = (py - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [text(LEFT, 22, title, anchor="start", size=15), text(WIDTH - RIGHT, HEIGHT - 8, x, anchor="end")]
    for value in ticks(low_y, high_y):
        _, y = place(low_x, value)
        parts += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>',
                  text(LEFT - 6, y + 4, f"{value:g}", anchor="end")]
    for value in ticks(low_x, high_x):
        across, _ = place(value, low_y)
        parts.append(text(across, HEIGHT - BOTTOM + 16, f"{value:g}"))
    for number, (name, points) in enumerate(lines.items()):
        line = " ".join(f"{px},{py}" for px, py in (place(*point) for point in points))
        color = COLORS[number % len(COLORS)]
        dashes = ' stroke-dasharray="5 4"' if number % 2 else ""
        look = f'stroke="{color}" stroke-width="1.6"{dashes}'
        parts.append(f'<polyline points="{line}" fill="none" {look}/>')
        if len(points) <= MARKED:
            parts += [f'<circle cx="{px}" cy="{py}" r="3" fill="{color}"/>' for px, py in (place(*point) for point in points)]
        left = LEFT + LEGEND * number  # the legend is above the plot, where no line can be
        parts += [f'<line x1="{left}" x2="{left + 30}" y1="{TOP - 16}" y2="{TOP - 16}" {look}/>',
                  text(left + 38, TOP - 12, name, anchor="start")]
    return picture(WIDTH, HEIGHT, parts)
