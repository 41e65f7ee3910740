"""Flags of the original's converter that need no option here: taken out of a command line, with a note that says why."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Any

import yaml

from modellink.kernels.errors import ModelLinkError


def table() -> dict[str, dict[str, Any]]:
    """Flag -> what `original_flags.yaml` says about it."""
    text = resources.files("modellink.ckpt_convert").joinpath("original_flags.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


def without_original_flags(args: list[str]) -> list[str]:
    """The command line without them.

    Raises:
        ModelLinkError: a flag has a value that asks for something else than is done here.
    """
    known, kept, at = table(), [], 0
    while at < len(args):
        flag, has_value, value = args[at].partition("=")
        at += 1
        if flag not in known:
            kept.append(args[at - 1])
            continue
        about = known[flag]
        if "refused" in about:
            raise ModelLinkError(f"{flag} is not done here: {about['refused']}", where=flag, fix=about["fix"])
        values = [value] if has_value else args[at:at + _count(about["values"], args[at:])]
        at += 0 if has_value else len(values)
        if about.get("only") and not set(values) <= set(about["only"]):
            raise ModelLinkError(f"{flag} {' '.join(values)} is not done here", where=flag,
                                 fix=f"leave it out: {about['ignored']}")
        print(f"note: {flag} is ignored: {about['ignored']}", file=sys.stderr)
    return kept


def _count(values: int | str, rest: list[str]) -> int:
    """How many of the words behind a flag are its values."""
    if isinstance(values, int):
        return values
    return next((number for number, word in enumerate(rest) if word.startswith("--")), len(rest))
