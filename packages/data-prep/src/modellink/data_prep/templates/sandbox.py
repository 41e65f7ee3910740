# SPDX-License-Identifier: Apache-2.0
"""Run Jinja chat templates, which are code from the internet, in a sandbox.

A template runs in Jinja's immutable sandbox: it has no access to Python internals, files, the network or processes, cannot modify
its inputs, and sees only plain data. Its length is limited to `LONGEST` characters.

*Not* contained: processor time and memory of an expression. Jinja has no `while`, and `range` stops at 100,000, but nested loops
can run very long, and `"a" * 10**10` or a format width can request all memory. To run untrusted templates as a service, limit the
process (ulimit, a container).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modellink.data_prep.templates.literal import BEGIN, END
from modellink.kernels.errors import ModelLinkError

LONGEST = 64 << 20  # characters


def render_template(source: str, *, where: str = "chat template", mark: bool = False, today: date | None = None,
                    **variables: Any) -> str:
    """Render the Jinja text of a chat template in the sandbox; every failure is a ModelLinkError that names the line.

    Args:
        mark: write BEGIN and END around the content of `{% generation %}`.
        today: the date (at midnight) that `strftime_now` formats. Default: the current time.
    """
    try:
        pieces, length = [], 0
        now = datetime.now() if today is None else datetime(today.year, today.month, today.day)
        given = {name: _plain(value, name) for name, value in variables.items()}
        for piece in _compile(source, mark).generate({"strftime_now": lambda form: now.strftime(form)} | given):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise SecurityError(f"the template is longer than {LONGEST:,} characters")
        return "".join(pieces)
    except ModelLinkError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise ModelLinkError(f"the chat template is not valid Jinja: {error.message}", where=f"{where}, line {error.lineno}",
                             fix="fix the template") from None
    except SecurityError as error:
        raise ModelLinkError(f"the chat template was stopped: {error}", where=_line(where, error),
                             fix="find out what this template tries to do before you use it") from None
    except _Refusal as error:
        raise ModelLinkError(f"the chat template refuses these messages: {error}", where=_line(where, error),
                             fix="change the messages to what the template expects") from None
    except Exception as error:  # any exception an expression in the template can raise, including RecursionError
        raise ModelLinkError(f"the chat template failed: {type(error).__name__}: {error}", where=_line(where, error),
                             fix="check that the messages have the keys the template uses") from None


class _Refusal(jinja2.TemplateError):
    """`raise_exception` in a template."""


class _Generation(Extension):
    """The `{% generation %}` tag, which marks the text of the assistant; in the output it is only a scope."""

    begin = end = ""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)] if mark else [], lineno=line) for mark in (self.begin, self.end)]
        return nodes.Scope([marks[0], *body, marks[1]], lineno=line)


class _Marked(_Generation):
    begin, end = BEGIN, END


def _refuse(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """The `tojson` filter, without Jinja's escapes of `<`, `>`, `&` and non-ASCII text, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(source: str, mark: bool = False) -> jinja2.Template:
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols", _Marked if mark else _Generation])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    return sandbox.from_string(source)


def _plain(value: object, name: str) -> Any:
    """Copy a value to plain JSON types, so that a template cannot reach the methods of an object."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # for a subclass such as an enum, its text
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    raise ModelLinkError(f"{name} holds a {type(value).__name__}; a chat template is given text, numbers, lists and objects")


def _line(where: str, error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f"{where}, line {lines[-1]}" if lines else where
