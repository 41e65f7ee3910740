"""When two mathematical answers written in LaTeX are the same, and where the answer stands in a text.

The rules are those people compare with: the answer is what is boxed, else what stands between dollar signs, else what follows the
last equals sign, else the last number (AGIEval, `src/post_process.py`); two of them are the same when their texts are after
spellings that mean the same were made one (Hendrycks et al., MATH, arXiv:2103.03874, `math_equivalence.py`). No algebra is done.
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
    """The answer in a text; its first line where that as a whole is the target, for a formula need not be marked as one."""
    line = text.strip().split("\n")[0].rstrip(".").replace("$", "")
    return line if same(line, target) else find_answer(text)


def find_answer(text: str) -> str | None:
    """The answer in a text, None where there is none."""
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
    """What stands between the first brace and the one that closes it."""
    depth, start = 0, text.find("{") + 1
    for place in range(start - 1, len(text)) if start else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def same(answer: str, target: str) -> bool:
    return normal(answer) == normal(target)


def normal(text: str) -> str:
    """One spelling of an answer."""
    for expression, spelling in SPELLINGS:
        text = re.sub(expression, spelling, text)
    return text
