# SPDX-License-Identifier: Apache-2.0
"""The meaning of columns: defaults of each style, those of a handler in `handlers.json`, and `--map-keys`.

Columns of the style `alpaca`: prompt, query, response, history, system, chosen, rejected; of `sharegpt`: messages, system, tools,
chosen, rejected. A name mapped to "" is not read. `tags` names the keys and roles of messages; omitted tags keep their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from modellink.kernels.errors import ModelLinkError, near

COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
               "chosen": "chosen", "rejected": "rejected"},
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
    "spoken": {"prompt": "instruction", "response": "output"},
    "moss": {"messages": "chat"},
}
NEEDED = {"alpaca": ("prompt", "response"), "sharegpt": ("messages",), "spoken": ("prompt", "response"), "moss": ("messages",)}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}


@dataclass(frozen=True)
class FieldMap:
    """How the rows of a file are read.

    Attributes:
        columns: column of each meaning, or several that are joined by line ends; "" is no column.
        needed: meanings whose columns are required.
        named: meanings whose columns the user named.
        tags: see TAGS.
        ranking: rows hold a chosen and a rejected answer.
        extra: further settings of the handler.
    """

    style: str
    columns: dict[str, str | list[str]]
    needed: tuple[str, ...]
    tags: dict[str, str]
    ranking: bool = False
    extra: dict[str, str] = field(default_factory=dict)
    named: tuple[str, ...] = ()

    def column_names(self, *, needed: bool) -> list[str]:
        """Return the required columns, or the optional ones."""
        return self._columns_of([meaning for meaning in self.columns if (meaning in self.needed) == needed])

    def named_columns(self) -> list[str]:
        """Return the optional columns that the user named; a file with a header must have them."""
        return self._columns_of([meaning for meaning in self.named if meaning not in self.needed])

    def _columns_of(self, meanings: Sequence[str]) -> list[str]:
        found: list[str] = []
        for column in (self.columns.get(meaning) for meaning in meanings):
            if column:
                found += [column] if isinstance(column, str) else column
        return list(dict.fromkeys(found))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FieldMap:
        values = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("needed", "named")})


def field_map(style: str, given: dict[str, Any] | None, *, ranking: bool = False, own: dict[str, Any] | None = None,
              where: str = "--map-keys", extra: dict[str, str] | None = None) -> FieldMap:
    """Combine the defaults of a style, the columns of the handler and the map of the user, in rising precedence.

    Raises:
        ModelLinkError: a name is unknown, or a value is not a column name.
    """
    given = dict(given or {})
    tags = given.pop("tags", None) or {}
    known = COLUMNS[style]
    _check(given, list(known) + (["tags"] if style == "sharegpt" else []), where)
    _check(tags, list(TAGS), f"{where}, tags")
    columns: dict[str, str | list[str]] = {**known, **(own or {}), **{name: value or "" for name, value in given.items()}}
    needed = {name for name in NEEDED[style] if not (ranking and name == "response")}
    if ranking:
        needed |= {"chosen", "rejected"}
    else:
        columns = {name: column for name, column in columns.items() if name not in ("chosen", "rejected")}
    for name in sorted(needed):
        if not columns.get(name):
            raise ModelLinkError(f"{name} is mapped to no column", where=where, fix="only optional columns can be \"\"")
    if ranking:
        columns.pop("response", None)
    return FieldMap(style, columns, tuple(sorted(needed & set(columns))), {**TAGS, **tags}, ranking, extra or {},
                    tuple(name for name, value in given.items() if value))


def _check(given: object, known: list[str], where: str) -> None:
    if not isinstance(given, dict):
        raise ModelLinkError(f"a {type(given).__name__} where a JSON object is expected", where=where)
    for name, value in given.items():
        if name not in known:
            raise ModelLinkError(f"unknown key {name!r}", where=where, fix=near(name, known) or f"known: {', '.join(known)}")
        if not isinstance(value, str | None):
            raise ModelLinkError(f"{name} is {value!r}, not a column", where=where)


@lru_cache(maxsize=1)
def known_handlers() -> dict[str, dict[str, Any]]:
    """`handlers.json`."""
    text = resources.files("modellink.data_prep.handlers").joinpath("handlers.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found
