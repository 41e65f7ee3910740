# SPDX-License-Identifier: Apache-2.0
"""Draw the packages and their floors from their imports: `python tools/house.py`; `--check` only reports a stale picture.

The picture is docs/en/house.svg. A floor holds the folders and top-level modules of a package that import from lower floors
only (the longest chain of imports below them); an arrow leads from a package to one it imports. modellink-kernels must be
installed.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping

from arrows import PACKAGES, ROOT, Arrows, folder_arrows, imports_of, module_arrows, modules
from modellink.kernels.svg import picture, text

TARGET = ROOT / "docs" / "en" / "house.svg"
SUMMARIES = {
    "kernels": "files, errors, options, devices, layouts, fused ops",
    "ckpt_convert": "what a model is; checkpoints of every format",
    "data_prep": "text to ids",
    "core": "training",
    "infer": "generation, chat, server",
    "eval": "benchmark scores",
}
WIDTH, MARGIN, GAP = 1000, 16, 46
LEFT = (MARGIN, 600)  # x and width
RIGHT = (MARGIN + 600 + GAP, WIDTH - 2 * MARGIN - 600 - GAP)
FULL = (MARGIN, WIDTH - 2 * MARGIN)
COLUMNS = {"eval": FULL, "infer": LEFT, "core": LEFT, "ckpt_convert": LEFT, "data_prep": RIGHT, "kernels": FULL}
TITLE, LINE, PADDING = 30, 16, 3
CHARACTER = 6.6  # average width of a character of 12 px
COLORS = {"eval": "#f3e3ec", "infer": "#e3e8f5", "core": "#e0eefa", "ckpt_convert": "#e2f2e6", "data_prep": "#fbf0dc",
          "kernels": "#ececec"}


def package_arrows(*, at_import: bool | None = None) -> Arrows:
    """Return which packages each package imports; `at_import`: only imports that run at import time."""
    found: Arrows = {package: set() for package in PACKAGES}
    for package in PACKAGES:
        for module, path in modules(package).items():
            for item in imports_of(path, module):
                top, _, rest = item.name.partition(".")
                other = rest.partition(".")[0]
                if top == "modellink" and other in PACKAGES and (item.at_import or not at_import):
                    found[package].add(other)
        found[package].discard(package)
    return found


def direct(arrows: Mapping[str, set[str]]) -> Arrows:
    """Return the arrows that no chain of other arrows implies."""
    def reachable(node: str) -> set[str]:
        return {further for target in arrows[node] for further in {target} | reachable(target)}
    return {node: {target for target in targets
                   if not any(target in reachable(other) for other in targets - {target})}
            for node, targets in arrows.items()}


def floors(package: str) -> list[list[str]]:
    """Return the names on each floor of a package, top to bottom; folders end with a slash."""
    files = modules(package)
    arrows = folder_arrows(module_arrows(files))
    folders = {module.split(".")[2] for module in files if module.count(".") > 2}
    heights: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in heights:
            heights[node] = 1 + max((height(target) for target in arrows[node] - {"__init__"}), default=0)
        return heights[node]
    found: list[list[str]] = [[] for _ in range(max(height(node) for node in arrows if node != "__init__"))]
    for node in sorted(arrows.keys() - {"__init__"}):
        found[-height(node)].append(f"{node}/" if node in folders else node)
    return found


class Building:
    """The box of a package, with its floors as rows."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.x, self.width = COLUMNS[package]
        limit = int((self.width - 2 * MARGIN) / CHARACTER)
        self.rows = [textwrap.wrap("   ".join(names), limit, drop_whitespace=True) for names in floors(package)]
        self.height = TITLE + sum(self._height(row) for row in self.rows) + PADDING
        self.y = 0

    @staticmethod
    def _height(row: list[str]) -> int:
        return LINE * len(row) + 2 * PADDING

    @property
    def bottom(self) -> int:
        return self.y + self.height

    def parts(self) -> Iterator[str]:
        yield (f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="4" '
               f'fill="{COLORS[self.package]}" stroke="#555"/>')
        name = f"modellink-{self.package.replace('_', '-')}"
        yield text(self.x + MARGIN, self.y + 20, f"{name}: {SUMMARIES[self.package]}", anchor="start", size=14)
        y = self.y + TITLE
        for row in self.rows:
            yield (f'<rect x="{self.x + PADDING}" y="{y}" width="{self.width - 2 * PADDING}" height="{self._height(row) - 2}" '
                   'fill="white" fill-opacity="0.75"/>')
            for number, line in enumerate(row, 1):
                yield text(self.x + self.width / 2, y + LINE * number, line)
            y += self._height(row)


def arrow(start: tuple[float, float], end: tuple[float, float], *, late: bool) -> str:
    """Return an arrow; `late`: dashed, for imports inside functions."""
    dashes = ' stroke-dasharray="6 4"' if late else ""
    return (f'<line x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}" stroke="#333" stroke-width="1.5"'
            f'{dashes} marker-end="url(#head)"/>')


def place() -> dict[str, Building]:
    """Return the buildings at their positions: eval is the roof, kernels the foundation, data-prep next to the others."""
    found = {package: Building(package) for package in COLUMNS}
    y = MARGIN
    for package in ("eval", "infer", "core", "ckpt_convert", "kernels"):
        found[package].y = y
        y = found[package].bottom + GAP
    right = found["data_prep"]
    right.y = found["ckpt_convert"].bottom - right.height
    return found


def connections(buildings: Mapping[str, Building]) -> Iterator[str]:
    """Yield the arrows between the packages."""
    at_import = package_arrows(at_import=True)
    needed, possible = direct(at_import), direct(package_arrows())
    for package in PACKAGES:
        for target in sorted(needed[package] | (possible[package] - at_import[package])):
            upper, lower = buildings[package], buildings[target]
            left, right = max(upper.x, lower.x), min(upper.x + upper.width, lower.x + lower.width)
            late = target not in at_import[package]
            if left < right:  # one above the other
                middle = (left + right) / 2
                yield arrow((middle, upper.bottom), (middle, lower.y - 3), late=late)
            else:
                yield arrow((upper.x + upper.width, upper.bottom - 20), (lower.x + 40, lower.y - 3), late=late)


def draw() -> str:
    """Return the picture as SVG."""
    buildings = place()
    height = buildings["kernels"].bottom + 2 * MARGIN + 2 * LINE
    head = ('<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker></defs>')
    notes = ["An arrow leads to a package that is imported; arrows that follow from others are left out. Dashed: only inside "
             "functions.",
             "Inside a package, each row imports only from the rows below it. Folders end with a slash."]
    legend = [text(MARGIN, buildings["kernels"].bottom + MARGIN + LINE * number, note, anchor="start")
              for number, note in enumerate(notes, 1)]
    parts = [part for building in buildings.values() for part in building.parts()]
    return picture(WIDTH, height, [head, *parts, *connections(buildings), *legend])


def main() -> int:
    drawn = draw()
    if "--check" in sys.argv:
        stale = not TARGET.is_file() or TARGET.read_text("utf-8") != drawn
        print(f"{TARGET.relative_to(ROOT)} {'is stale: run python tools/house.py' if stale else 'is up to date'}")
        return int(stale)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(drawn, "utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
