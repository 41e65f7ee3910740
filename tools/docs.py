# SPDX-License-Identifier: Apache-2.0
"""Fill the option tables of the READMEs from the dataclasses: `python tools/docs.py`; `--check` only lists stale files.

A table is enclosed by `<!-- options of MODULE:CLASS -->` and `<!-- end of options -->`. All six packages must be installed.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from modellink.kernels.options import describe

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- options of (\S+):(\w+) -->\n).*?(\n<!-- end of options -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a README with all tables regenerated."""
    def table(match: re.Match[str]) -> str:
        return match[1] + describe(getattr(importlib.import_module(match[2]), match[3])) + match[4]
    return TABLE.sub(table, text)


def stale() -> list[Path]:
    """Return the READMEs with outdated tables."""
    files = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
    return [path for path in files if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]


if __name__ == "__main__":
    found = stale()
    for path in found:
        print(f"{path.relative_to(ROOT)} {'is stale' if '--check' in sys.argv else 'filled'}")
        if "--check" not in sys.argv:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(bool(found) and "--check" in sys.argv)
