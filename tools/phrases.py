# SPDX-License-Identifier: Apache-2.0
"""Find dialect and British spelling in texts that users and readers see: `python tools/phrases.py [--package NAME ...]`.

Phrases are matched in docstrings, comments and string literals of Python files and in whole .md, .yaml, .toml and .html files,
across line breaks; spelling also in Python names. NAME is a folder of packages/, or `root` for everything else; default: all.
Exit status 1 if anything is found. Not covered: style that no list of phrases can catch.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tests", "tools", "examples", "benchmarks", "packages", "docs", ".github")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html"}
SKIPPED = {"__pycache__", "dist", "build", ".hypothesis", ".pytest_cache"}

UNIT = r"(?:rank|row|layer|line|question|sample|piece|process|processor|preset|stage|token|family|benchmark|thread|subject)"
PHRASES = {
    r"where nothing (?:else )?(?:is|was|says)\b": "Default: ...",
    r"where (?:nobody|no one) (?:says|said)\b|\bnobody (?:says|said)\b": "Default: ...; if it is not set",
    r"(?:found|seen) (?:out )?by looking": "detected",
    r", and (?:there|that|it) (?:is|are|has|have) (?:none|no|one)\b": "name what is missing: needs X, but --y is not set",
    r"there (?:is|are) none\b|\b(?:that|which) (?:is|are) (?-i:none)\b|\b\w+s are (?-i:none)\b": "is missing; is not a ...",
    r"(?<!there )(?<!There )(?:is|are) no (?:number|text|file|folder|name|journal|path|list|sentence)s?\b": "is not a ...",
    r"anew\b": "again, from scratch",
    r"(?:is|are|was|were|be) told\b(?! apart)": "is configured; receives; is reported",
    r"(?:tells?|told) of\b": "reports, names",
    r"(?:is|are) said\b|\bwhat (?:is|was) said\b": "is logged, is reported",
    r"(?:does|do|did) not say (?:it|so|which)\b": "does not specify it",
    r"go(?:es|ing)? on with\b|\bto go on\b": "continues, resumes",
    r"goes on\b": "continues",
    r"cut over\b": "sharded over, split across",
    r"dealt (?:to|out|over)\b": "split across, assigned to",
    r"(?:is|are|stands?|stays?|stayed|made|makes?) whole\b|\bwhole again\b": "complete, consistent, unsharded",
    r"by itself alone": "on its own",
    r"beside\b": "next to, alongside, in addition to",
    r"one behind the other": "one after the other",
    r"mend(?:s|ed)?\b": "fix",
    r"leave (?:it|them|this) out\b": "remove it",
    r"(?:^|in|of|or|keep|only|the first|after) so many\b(?! that)": "name the number: Number of layers ...",
    r"(?:is|are) to be had\b": "is available",
    r"in the place of\b": "instead of",
    r"how far it is\b": "progress",
    r"lies? (?:in|below|beside|behind|next to|beyond|under)\b": "is in, is below",
    r"stands? (?:in|beside|below|above|between|behind|at)\b(?!-)": "is in, is at",
    r"(?:it|that|this) pays\b|\bwhether .{1,20} pays\b": "is faster, is worthwhile",
    rf"(?:one|an? \w+) an? {UNIT}\b(?! (?:and|or)\b)": "one per ...",
}
"""Regular expressions, which begin at a word, to what a plain sentence has instead."""

_IS = ("tokeni|initiali|quanti|normali|seriali|summari|organi|recogni|optimi|synchroni|paralleli|minimi|maximi|speciali|generali|"
       "materiali|finali|reali|categori|utili|visuali|memori|customi|vectori|factori|prioriti|penali|canonicali|locali|stabili|"
       "emphasi|randomi|standardi|characteri|saniti")
BRITISH = re.compile(
    rf"(?:{_IS})s(?:e|es|ed|er|ers|ing|ation|able)(?![a-z])|analys(?:e|ed|ing)(?![a-z])"
    r"|(?:behavi|col|fav|neighb|hon|flav|endeav)our(?:s|ed|ing|ite|able)?(?![a-z])"
    r"|(?<![a-z_])(?:centre[sd]?|modelled|modelling|labelled|labelling|licence|defence|artefacts?|judgement|whilst|learnt|spelt)"
    r"(?![a-z])",
    re.IGNORECASE)

_PHRASES = [(re.compile(rf"(?<![\w-])(?:{pattern})", re.IGNORECASE), advice) for pattern, advice in PHRASES.items()]


@dataclass(frozen=True)
class Finding:
    path: Path
    line: int
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.words!r}: write {self.advice}"


class Segment:
    """A run of text that is read as one, with the line of every character; white space between words is one space."""

    def __init__(self) -> None:
        self.text = ""
        self._starts: list[int] = []
        self._lines: list[int] = []

    def add(self, text: str, line: int) -> None:
        for number, part in enumerate(text.split("\n"), line):
            self._starts.append(len(self.text))
            self._lines.append(number)
            words = " ".join(part.split())
            if words:
                self.text += words + " "

    def line_of(self, offset: int) -> int:
        return self._lines[bisect_right(self._starts, offset) - 1]


def segments(path: Path) -> Iterator[Segment]:
    """Yield the texts of a file: comments and strings of Python, the whole of other files."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        found = Segment()
        found.add(re.sub(r"(?m)^\s*#+ |[\"'] *$", " ", source), 1)
        yield found
        return
    current, kind = Segment(), None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE) and kind is not None:
            continue  # implicitly joined strings and comments of several lines are one text
        if token.type not in (tokenize.STRING, tokenize.COMMENT) or token.type != kind:
            if current.text:
                yield current
            current, kind = Segment(), None
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            kind = token.type
            current.add(_bare(token), token.start[0])
    if current.text:
        yield current


def _bare(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        return token.string.lstrip("#")
    return re.sub(r"^[a-zA-Z]*(\"\"\"|'''|\"|')|(\"\"\"|'''|\"|')$|\\n", " ", token.string)


def names(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the identifiers of a Python file with their lines."""
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NAME:
                yield token.string, token.start[0]


def findings(path: Path) -> Iterator[Finding]:
    for segment in segments(path):
        for pattern, advice in [*_PHRASES, (BRITISH, "the American spelling")]:
            for match in pattern.finditer(segment.text):
                yield Finding(path, segment.line_of(match.start()), match[0].strip(), advice)
    for name, line in names(path):
        if BRITISH.search(name):
            yield Finding(path, line, name, "the American spelling")


def files(package: str | None = None) -> Iterator[Path]:
    """Yield the files to check of one package, of `root`, or of all."""
    folders = [ROOT / "packages" / package] if package not in (None, "root") else [ROOT / folder for folder in FOLDERS]
    if package in (None, "root"):
        yield from (path for path in sorted(ROOT.iterdir()) if path.suffix in SUFFIXES)
    for folder in folders:
        if package == "root" and folder.name == "packages":
            continue
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and not SKIPPED & set(path.parts) and path.name != Path(__file__).name:
                yield path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", action="append", metavar="NAME", help="check only this package; may be repeated")
    arguments = parser.parse_args()
    found = [finding for package in arguments.package or [None] for path in files(package) for finding in findings(path)]
    for finding in found:
        print(Finding(finding.path.relative_to(ROOT), finding.line, finding.words, finding.advice))
    print(f"{len(found)} phrases to rewrite" if found else "no dialect found")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
