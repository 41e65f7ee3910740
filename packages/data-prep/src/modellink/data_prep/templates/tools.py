# SPDX-License-Identifier: Apache-2.0
"""Describe tools as text at the end of a system prompt (`tools.json` has the wording, the original's default)."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from modellink.kernels.errors import ModelLinkError


def describe_tools(tools: list[dict[str, Any]]) -> str:
    """Return the description of `tools` for the model; each is a JSON schema with name, description and parameters.

    Raises:
        ModelLinkError: the parameters of a tool are not an object schema.
    """
    words = _words()
    text = ""
    for tool in tools:
        schema = tool.get("parameters") or {}
        known = schema.get("properties", {}) if isinstance(schema, dict) else None
        if not isinstance(known, dict) or not all(isinstance(item, dict) for item in known.values()):
            raise ModelLinkError(f"the parameters of the tool {tool['name']!r} are not an object schema")
        required = _list(tool, schema, "required")
        for about in known.values():
            _list(tool, about, "enum")
        arguments = "".join(_argument(name, about, name in required) for name, about in known.items())
        text += _put(words["tool"], name=tool["name"], description=tool.get("description", ""), arguments=arguments)
    return _put(words["prompt"], tools=text, names=", ".join(tool["name"] for tool in tools))


def _list(tool: dict[str, Any], schema: dict[str, Any], name: str) -> list[Any]:
    found = schema.get(name) or []
    if not isinstance(found, list):
        raise ModelLinkError(f"{name} of the tool {tool['name']!r} is a {type(found).__name__}, not a list")
    return found


def _argument(name: str, about: dict[str, Any], required: bool) -> str:
    words = _words()
    items = about.get("items")
    return _put(words["argument"], name=name, type=about.get("type", ""), required=words["required"] if required else "",
                description=about.get("description", ""),
                enum=_put(words["enum"], values=", ".join(map(str, about["enum"]))) if about.get("enum") else "",
                items=_put(words["items"], type=items.get("type", "")) if isinstance(items, dict) and items else "")


def _put(text: str, **values: object) -> str:
    pieces = text.split("{")
    found = pieces[0]
    for piece in pieces[1:]:
        name, closed, rest = piece.partition("}")
        found += f"{values[name]}{rest}" if closed and name in values else "{" + piece
    return found


@lru_cache(maxsize=1)
def _words() -> dict[str, str]:
    text = resources.files("modellink.data_prep.templates").joinpath("tools.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found
