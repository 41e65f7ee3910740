# SPDX-License-Identifier: Apache-2.0
"""Write real text that every Python contains: its language reference by topic, and the docstrings of its standard library.

Usage: text.py FILE.jsonl
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST = 200  # characters


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings of the modules directly in `folder`, without importing them; short ones are skipped."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    yield text


def main(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [topics[name].strip() for name in sorted(topics)] + list(docstrings(Path(sysconfig.get_path("stdlib"))))
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"{path}: {len(texts):,} documents, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
