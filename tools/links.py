# SPDX-License-Identifier: Apache-2.0
"""Check the links of Markdown files: `python tools/links.py [FILE ...]`; default: all of the repository.

A relative link must lead to a file or folder of the repository, and its anchor to a heading there. Links inside code are
text. Not covered: whether an address on the internet answers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".nox", ".cache", "node_modules", "quickstart", "results", "dist", "build", ".venv", ".hypothesis", ".pytest_cache"}
CODE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1|<!--.*?-->|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
TARGET = re.compile(
    r"\]\(\s*<?(?P<inline>[^()\s<>]+)>?(?:\s+\"[^\"]*\")?\s*\)"     # [text](target "title")
    r"|^ {0,3}\[[^\[\]]+\]:\s*<?(?P<reference>[^\s<>]+)"            # [text]: target
    r"|\b(?:href|src)=[\"'](?P<html>[^\"']+)[\"']", re.MULTILINE)   # <a href="target">
HEADING = re.compile(r"^ {0,3}#{1,6} +(.*?)(?: +#+)?$", re.MULTILINE)


class Link(NamedTuple):
    line: int
    target: str

    @property
    def is_absolute(self) -> bool:
        return re.match(r"[a-zA-Z][a-zA-Z+.-]*:", self.target) is not None


def _blank(match: re.Match[str]) -> str:
    """Return white space of the same length and with the same lines."""
    return re.sub(r"[^\n]", " ", match[0])


def links(text: str) -> Iterator[Link]:
    """Yield the links of a Markdown text, images included, with their line numbers."""
    bare = CODE.sub(_blank, text)
    for match in TARGET.finditer(bare):
        target = match["inline"] or match["reference"] or match["html"]
        yield Link(bare.count("\n", 0, match.start()) + 1, target)


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors of a Markdown file as forges make them: lower case, dashes for blanks, no punctuation."""
    text = path.read_text("utf-8")
    fences = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1", re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in HEADING.findall(fences.sub(_blank, text)):
        words = re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return frozenset(found) | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def broken(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield a line for each relative link of a Markdown file that leads nowhere."""
    for link in links(path.read_text("utf-8")):
        if link.is_absolute:
            continue
        where = f"{path.relative_to(root)}:{link.line}: {link.target}"
        name, _, anchor = link.target.partition("#")
        target = (path.parent / name).resolve() if name else path
        if target != root and not target.is_relative_to(root):
            yield f"{where}: outside of the repository"
        elif not target.exists():
            yield f"{where}: no such file"
        elif anchor and target.is_dir():  # a forge shows the README of a folder
            if not (target / "README.md").is_file() or anchor not in anchors(target / "README.md"):
                yield f"{where}: no such heading"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{where}: no such heading"


def markdown_files(root: Path = ROOT) -> list[Path]:
    """Return the Markdown files of the repository, without output of tools."""
    found = []
    for path in sorted(root.rglob("*.md")):
        if not SKIPPED & set(path.relative_to(root).parts):
            found.append(path)
    return found


def main() -> int:
    files = [Path(name).resolve() for name in sys.argv[1:]] or markdown_files()
    problems = [problem for path in files for problem in broken(path)]
    print("\n".join(problems) or f"the links of {len(files)} files lead somewhere")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
