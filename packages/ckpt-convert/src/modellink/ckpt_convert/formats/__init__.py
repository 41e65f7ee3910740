"""Checkpoint formats, found by registration.

A format is a module with a class marked `@register` (see format.py). Modules in this folder are discovered;
modules of other distributions are named by entry points of the group `modellink.formats`. Adding a format
changes no other file.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points

from modellink.ckpt_convert.format import Format
from modellink.kernels.options import choose

GROUP = "modellink.formats"
_formats: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format known under its name."""
    _formats[cls.name] = cls()
    return cls


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__, prefix=__name__ + "."):
        importlib.import_module(module.name)
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # another distribution; it must not break the other formats
            print(f"note: the format {entry.name} of {entry.value} is not available: {type(error).__name__}: "
                  f"{error}",
                  file=sys.stderr)


def formats() -> list[Format]:
    """Return all formats, ours first, in the order in which a folder is checked against them."""
    _discover()
    return list(_formats.values())


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, the values of `--to`."""
    return tuple(form.name for form in formats())


def format_of(name: str, where: str = "--to") -> Format:
    """Return the format of that name; `_` and `-` are interchangeable.

    Raises:
        ModelLinkError: the name is unknown; the nearest one is suggested.
    """
    known = format_names()
    return _formats[choose(name, known, flag="--to", where=where, option="to")]
