# SPDX-License-Identifier: Apache-2.0
"""A conversation in one normal form: system text, tools, and alternating turns.

Roles are `user`, `assistant`, `tool` (the result of a function; also `observation`) and `function` (a call by the model; also
`function_call`, or an assistant message with `tool_calls`). The assistant's turns are `assistant` and `function`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from modellink.kernels.errors import ModelLinkError

ROLES = {"user": "user", "assistant": "assistant", "tool": "tool", "observation": "tool", "function": "function",
         "function_call": "function", "system": "system"}
ASKED, SAID = ("user", "tool"), ("assistant", "function")


@dataclass
class Conversation:
    """System text, tools and turns.

    Attributes:
        turns: (role, text), first to last; the text of a `function` turn is JSON with `name` and `arguments`.
        system: the system prompt, or an empty string.
        tools: JSON schemas of functions.
    """

    turns: list[tuple[str, str]]
    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ends_with_question(self) -> bool:
        return bool(self.turns) and self.turns[-1][0] in ASKED

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages in the form that chat templates of models expect."""
        found: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for role, text in self.turns:
            if role == "function":
                calls = [{"type": "function", "function": call} for call in function_calls(text)]
                found.append({"role": "assistant", "content": "", "tool_calls": calls})
            else:
                found.append({"role": role, "content": text})
        return found


def from_messages(messages: Sequence[Mapping[str, Any]], tools: object = None) -> Conversation:
    """Make a conversation from `{"role", "content"}` objects.

    Raises:
        ModelLinkError: it is empty, a role is unknown, a content is not text, or the turns do not alternate.
    """
    turns: list[tuple[str, str]] = []
    system = ""
    for position, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ModelLinkError(f"message {position} is a {type(message).__name__}, it must be an object with role and content")
        role = ROLES.get(str(message.get("role")))
        if role is None:
            raise ModelLinkError(f"message {position} has the unknown role {message.get('role')!r}",
                                 fix=f"roles are {', '.join(ROLES)}")
        content = message.get("content")
        if role == "assistant" and (calls := message.get("tool_calls")):
            if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
                raise ModelLinkError(f"the tool_calls of message {position} are not a list of objects")
            role, content = "function", json.dumps([call.get("function", call) for call in calls], ensure_ascii=False)
        if not isinstance(content, str):
            raise ModelLinkError(f"the content of message {position} is a {type(content).__name__}, not a text")
        if role == "system":
            if position != 1:
                raise ModelLinkError(f"message {position} is a system prompt", fix="only the first message can be one")
            system = content
        else:
            turns.append((role, content))
    problem = order_problem(turns)
    if problem:
        raise ModelLinkError(problem)
    return Conversation(turns, system, tool_list(tools))


def order_problem(turns: Sequence[tuple[str, str]]) -> str:
    """Describe the fault in the order of the turns; empty if it is right."""
    if not turns:
        return "the conversation is empty"
    for index, (role, _) in enumerate(turns):
        if role not in (SAID if index % 2 else ASKED):
            return f"turn {index + 1} is from {role}, it must be from {' or '.join(SAID if index % 2 else ASKED)}"
    return ""


def tool_list(tools: object) -> list[dict[str, Any]]:
    """Return tools as a list of schemas; also accepts JSON text and `{"type": "function", "function": ...}` wrappers.

    Raises:
        ModelLinkError: the value has none of these forms.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ModelLinkError(f"the tools are not JSON: {error}") from None
    if not tools:
        return []
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ModelLinkError("tools must be a list of objects")
    found = [tool.get("function", tool) for tool in tools]
    if missing := [tool for tool in found if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str)]:
        raise ModelLinkError(f"a tool has no name: {str(missing[0])[:80]}")
    return [dict(tool) for tool in found]


def function_calls(text: str) -> list[dict[str, Any]]:
    """Parse the calls in the text of a `function` turn.

    Raises:
        ModelLinkError: it is not JSON with a name and arguments.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelLinkError(f"a function call is not JSON: {error}") from None
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise ModelLinkError("a function call has no name or no arguments")
        if isinstance(call["arguments"], str):
            with suppress(json.JSONDecodeError):
                call["arguments"] = json.loads(call["arguments"])
    return calls
