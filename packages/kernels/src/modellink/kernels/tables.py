# SPDX-License-Identifier: Apache-2.0
"""Tables of results as text: aligned columns that fit a terminal; full lines in files and pipes.

Not here: progress (progress.py), and machine-readable output, for which commands have `--json`.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence

GAP = "  "
READABLE = 32  # characters of a wrapped column for which optional columns are omitted
NARROWEST = 16  # characters that it keeps in any case


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "",
                right: Collection[str] = (), optional: Sequence[str] = (), wrap: str | None = None) -> None:
    """Print a table; an empty row is a blank line.

    Args:
        columns: headings; without any text in them no heading line is printed.
        right: columns whose cells are aligned to the right.
        optional: columns that a narrow terminal omits, the first one first.
        wrap: the column whose cells are wrapped on a narrow terminal. Default: the last.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = table_lines(columns, rows, width=width, right=right, optional=optional, wrap=wrap)
    print(*([title] if title else []), *lines, sep="\n", flush=True)


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[object]], *, width: int | None = None,
                right: Collection[str] = (), optional: Sequence[str] = (),
                wrap: str | None = None) -> list[str]:
    """Return the lines of a table; see `print_table`.

    Args:
        width: number of characters of a line. Default: unlimited.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    kept = list(range(len(columns)))
    wrapped = len(columns) - 1 if wrap is None else columns.index(wrap)
    widths = [max((len(row[at]) for row in [list(columns), *cells] if row), default=0) for at in kept]

    def missing() -> int:
        """Return the number of characters by which a line is too long."""
        return 0 if width is None else sum(widths[at] for at in kept) + len(GAP) * (len(kept) - 1) - width

    for name in optional:
        if missing() + min(widths[wrapped], READABLE) - widths[wrapped] <= 0:
            break
        kept.remove(columns.index(name))
    if missing() > 0:
        widths[wrapped] = max(NARROWEST, widths[wrapped] - missing())
    shown = [*([list(columns)] if any(columns) else []), *cells]
    return [line for row in shown for line in _row_lines(row, columns, kept, widths, wrapped, right)]


def _row_lines(row: Sequence[str], columns: Sequence[str], kept: Sequence[int], widths: Sequence[int],
               wrapped: int, right: Collection[str]) -> list[str]:
    if not row:
        return [""]
    parts = {at: [row[at]] for at in kept}
    if wrapped in parts:
        parts[wrapped] = textwrap.wrap(row[wrapped], widths[wrapped]) or [""]
    lines = []
    for number in range(max(map(len, parts.values()))):
        texts = [parts[at][number] if number < len(parts[at]) else "" for at in kept]
        aligned = [text.rjust(widths[at]) if columns[at] in right else text.ljust(widths[at])
                   for at, text in zip(kept, texts, strict=True)]
        lines.append(GAP.join(aligned).rstrip())
    return lines
