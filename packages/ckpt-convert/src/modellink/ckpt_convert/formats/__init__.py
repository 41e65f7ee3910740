# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats, found by registration.

A format is a module with a class marked `@register` (see format.py). Modules in this folder are discovered;
modules of other distributions are named by entry points of the group `modellink.formats`. Adding a format
changes no other file.
"""

from __future__ import annotations

from functools import cache

from modellink.ckpt_convert.format import Format
from modellink.kernels.options import choose
from modellink.kernels.plugins import import_modules

GROUP = "modellink.formats"
_formats: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format known under its name."""
    _formats[cls.name] = cls()
    return cls


@cache
def _discover() -> None:
    import_modules(__name__, __path__, GROUP)


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
