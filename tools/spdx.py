# SPDX-License-Identifier: Apache-2.0
"""Write the license identifier at the top of every source file: `python tools/spdx.py`; `--check` only lists files without it.

The identifier is that of the packages' metadata; the first line of LICENSE must be the license it stands for.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("packages", "tests", "tools", "benchmarks", "examples")
SKIPPED = {"__pycache__", "build", "dist", ".hypothesis", ".pytest_cache"}
IDENTIFIER, TITLE = "Apache-2.0", "Apache License"
HEADERS = {".py": f"# SPDX-License-Identifier: {IDENTIFIER}\n", ".c": f"// SPDX-License-Identifier: {IDENTIFIER}\n"}


def sources() -> list[Path]:
    """Return the source files of the repository, without output of tools."""
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return sorted(path for path in files if path.suffix in HEADERS and not SKIPPED & set(path.parts))


def with_header(text: str, header: str) -> str:
    """Return a source text that begins with the header, after a line `#!`."""
    shebang, rest = "", text
    if text.startswith("#!"):
        first, _, rest = text.partition("\n")
        shebang = f"{first}\n"
    return text if rest.startswith(header) else shebang + header + rest


def main() -> int:
    if TITLE not in (ROOT / "LICENSE").read_text("utf-8")[:200]:
        raise SystemExit(f"LICENSE is not the {TITLE}, for which {IDENTIFIER} stands")
    missing = 0
    for path in sources():
        text = path.read_text("utf-8")
        wanted = with_header(text, HEADERS[path.suffix])
        if wanted != text:
            missing += 1
            print(f"{path.relative_to(ROOT)}: {'no license identifier' if '--check' in sys.argv else 'written'}")
            if "--check" not in sys.argv:
                path.write_text(wanted, "utf-8")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
