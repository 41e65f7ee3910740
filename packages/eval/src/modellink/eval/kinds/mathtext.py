# SPDX-License-Identifier: Apache-2.0
"""Find the mathematical answer in a LaTeX text, and compare two answers.

The rules are those in common use: the answer is the boxed text, else the text between dollar signs, else the text after the last
equals sign, else the last number (AGIEval, `src/post_process.py`). Two answers are equal if their texts are equal once equivalent
spellings are normalized (Hendrycks et al., MATH, arXiv:2103.03874, `math_equivalence.py`). Not here: algebra.
"""

from __future__ import annotations

import re

NUMBER = re.compile(r"\$?\d+(?:\.\d+)?(?!\w)")
SPELLINGS = (
    (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"), (r"\\left|\\right", ""), (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$", ""), (r"\\text\{ .*", ""), (r"\\%", ""), (r" \.", " 0."), (r"\{\.", "{0."), (r"^\.", "0."),
    (r"^[^=]{0,2}=([^=]*)$", r"\1"), (r"\\sqrt([^{])", r"\\sqrt{\1}"), (r" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"), (r"\\frac([^{])(?=\{)", r"\\frac{\1}"),
    (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"))


def read(text: str, target: str) -> str | None:
    """Return the answer in a text; its first line if that equals the target, since a formula need not be marked."""
    line = text.strip().split("\n")[0].rstrip(".").replace("$", "")
    return line if same(line, target) else find_answer(text)


def find_answer(text: str) -> str | None:
    """Return the answer in a text, or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start >= 0:
        boxed = _braced(text[start:])
        return boxed and boxed.split("=")[-1].strip()
    between = re.findall(r"\$(.*)\$", text)
    if between and between[-1]:
        return str(between[-1].split("=")[-1].lstrip(" "))
    if "=" in text:
        return text.split("=")[-1].lstrip(" ").rstrip(".").split("\\n")[0].strip() or None
    numbers = NUMBER.findall(text)
    return str(numbers[-1]) if numbers else None


def _braced(text: str) -> str | None:
    """Return the text between the first brace and the one that closes it."""
    depth, start = 0, text.find("{") + 1
    for place in range(start - 1, len(text)) if start else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def same(answer: str, target: str) -> bool:
    return normal(answer) == normal(target)


def normal(text: str) -> str:
    """Normalize the spelling of an answer."""
    for expression, spelling in SPELLINGS:
        text = re.sub(expression, spelling, text)
    return text
