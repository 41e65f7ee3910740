"""A line chart as SVG text. Written by hand because the plotting libraries weigh more than the package that would use them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 64, 40, 20, 44
COLOURS = ("#1f6feb", "#b35900", "#1a7f37", "#8250df")


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them, in steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / wanted))
    step = next(power * size for size in (1, 2, 5, 10) if span / (power * size) <= wanted)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw(points: Sequence[tuple[float, float]], *, title: str, x: str) -> str:
    """An SVG picture of y over x through `points`, in their order."""
    return draw_lines({"": points}, title=title, x=x)


def draw_lines(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str) -> str:
    """The same with several lines, told apart by colour and named; every second one is dashed, to be seen on the one before."""
    xs, ys = ([point[axis] for points in lines.values() for point in points] for axis in (0, 1))
    margin = 0.05 * ((max(ys) - min(ys)) or 1.0)
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys) - margin, max(ys) + margin

    def place(px: float, py: float) -> tuple[float, float]:
        across = (px - low_x) / ((high_x - low_x) or 1.0) * (WIDTH - LEFT - RIGHT)
        up = (py - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
             f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x)}</text>']
    for value in ticks(low_y, high_y):
        _, y = place(low_x, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in ticks(low_x, high_x):
        across, _ = place(value, low_y)
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        line = " ".join(f"{px},{py}" for px, py in (place(*point) for point in points))
        look = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.6"' + ' stroke-dasharray="5 4"' * (number % 2)
        parts.append(f'<polyline points="{line}" fill="none" {look}/>')
        if name:
            y = TOP + 16 + 18 * number
            parts.append(f'<line x1="{WIDTH - 220}" x2="{WIDTH - 190}" y1="{y}" y2="{y}" {look}/>'
                         f'<text x="{WIDTH - 182}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
