# SPDX-License-Identifier: Apache-2.0
"""Reads a field of a JSON object and checks its type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modellink.kernels.errors import ModelLinkError

NAMES = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean"}


def field(body: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    """Return a field of an object, or `default` if it is missing or null.

    Raises:
        ModelLinkError: the value has another type; `where` is the name of the field.
    """
    value = body.get(name)
    if value is None:
        return default
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ModelLinkError(f"{name} is {json.dumps(value)[:50]}, it must be of type "
                             f"{' or '.join(NAMES[kind] for kind in allowed)}", where=name)
    return value
