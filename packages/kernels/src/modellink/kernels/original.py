# SPDX-License-Identifier: Apache-2.0
"""Command lines of the original: flags that have another name here, have no effect, or request something
unsupported.

Each package lists them in its `original_flags.yaml`, except flags that have an option of the same name. An
entry has one of

    as: words that replace the flag; `{}` is its value, or the result of `of`
    choices: for each value the words that replace it; they override options of the same line
    ignored: the reason why it has no effect; printed as a note
    refused: what it would request, with `fix`: what to do instead

An ignored flag may have a condition under which it changes nothing; otherwise it is refused with `fix`: `only` (its
values), `least` (its value is at least that of another flag, [flag, default]), `with` (one of these flags is on the
line).

All may have `values`: the number of words that follow the flag (default: 0); `place`: first or last, if its words are
overridden by all others or override them; `of`: the value is a product, quotient or root with another flag's
value on the same line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.messages import note


def original_flags(package: str) -> dict[str, dict[str, Any]]:
    """Return the table of a package, e.g. `modellink.core`."""
    text = resources.files(package).joinpath("original_flags.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return table


def translate(args: Sequence[str], table: Mapping[str, Mapping[str, Any]],
              defaults: Sequence[str] = ()) -> list[str]:
    """Translate a command line of the original to our options.

    Args:
        defaults: options whose default differs in the original; they are put in front of a line that has a
            flag of the table.

    Raises:
        ModelLinkError: a flag requests something unsupported, or has an unknown value.
    """
    made: dict[str, list[str]] = {"first": [], "": [], "choices": [], "last": []}
    ignored: dict[str, list[str]] = {}
    index = 0
    while index < len(args):
        flag, joined, value = args[index].partition("=")
        index += 1
        about = table.get(flag) or table.get(flag.replace("_", "-"))
        if about is None:
            made[""].append(args[index - 1])
            continue
        values = [value] if joined else []
        while not joined and len(values) < about.get("values",
                                                     0) and index < len(args) and not args[index].startswith("--"):
            values.append(args[index])
            index += 1
        if "ignored" in about:
            _refuse_effect(flag, values, about, args)
            ignored.setdefault(about["ignored"], []).append(flag)
        else:
            place = "choices" if "choices" in about else about.get("place", "")
            made[place] += _words(flag, values, about, args)
    for why, flags in ignored.items():
        verb = "is" if len(flags) == 1 else "are"
        note(f"{', '.join(flags)} {verb} ignored: {why}")
    if not defaults or (not ignored and made[""] == list(args)):
        return [word for words in made.values() for word in words]
    note(f"this is a command line of the original; its defaults are used: {' '.join(defaults)}")
    return [*defaults, *(word for words in made.values() for word in words)]


def _refuse_effect(flag: str, values: list[str], about: Mapping[str, Any], line: Sequence[str]) -> None:
    """Raise ModelLinkError if an ignored flag would change the result."""
    value = " ".join(values)
    if "only" in about:
        harmless = value in about["only"]
    elif "least" in about:
        harmless = value.isdecimal() and int(value) >= _number_of(line, *about["least"])
    else:
        given = {word.partition("=")[0].replace("_", "-") for word in line}
        harmless = "with" not in about or not given.isdisjoint(about["with"])
    if not harmless:
        raise ModelLinkError(f"{flag} {value}".strip() + " would change the result, and is not supported", where=flag,
                             fix=about["fix"])


def _number_of(line: Sequence[str], flag: str, default: int) -> int:
    """The number given with `flag` on the line."""
    words = [part for word in line for part in word.split("=", 1)]
    follows = words[words.index(flag) + 1:][:1] if flag in words else []
    return int(follows[0]) if follows and follows[0].isdecimal() else default


def _words(flag: str, values: list[str], about: Mapping[str, Any], line: Sequence[str]) -> list[str]:
    if "of" in about and (value := _computed(values, about["of"], line)) is not None:
        values = [value]
    elif "refused" in about:
        raise ModelLinkError(f"{flag} is not supported: {about['refused']}", where=flag, fix=about.get("fix"))
    if "choices" in about:
        (value,) = values or [""]
        if value not in about["choices"]:
            raise ModelLinkError(f"{flag} is {value!r}", where=flag,
                                 fix=f"known: {', '.join(about['choices'])}")
        return [word for word in about["choices"][value].split() if word]
    return [word.replace("{}", " ".join(values)) for word in about["as"].split()]


def _computed(values: list[str], how: Mapping[str, str], line: Sequence[str]) -> str | None:
    """Return the value by `how` {product, quotient or root: another flag}; None if the line lacks that flag's
    number."""
    ((rule, other),) = how.items()
    try:
        theirs = float(line[line.index(other) + 1])
        own = float(values[0]) if values else 0.0
    except (ValueError, IndexError):
        return None
    found = {"product": own * theirs, "quotient": own / theirs if theirs else 0.0,
             "root": math.sqrt(theirs)}[rule]
    return f"{found:.17g}"
