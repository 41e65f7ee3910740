# SPDX-License-Identifier: Apache-2.0
"""The messages and tools of a chat in the form that chat templates expect: contents are strings, call
arguments are objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modellink.data_prep import Tokenizer
from modellink.infer.server.fields import field
from modellink.infer.template import Chat
from modellink.kernels.errors import ModelLinkError

RESERVED = ("tokenizer", "messages", "tools", "documents", "add_generation_prompt", "template", "mark",
            "source", "where")


def read_chat(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> Chat:
    """Return the conversation of a body, with its tools.

    Raises:
        ModelLinkError: a message or tool does not have the form of the API, or there is no chat template.
    """
    messages = field(body, "messages", list)
    if not messages:
        raise ModelLinkError("there are no messages", where="messages")
    if tokenizer is None:
        raise ModelLinkError("the model has no tokenizer, so it has no chat template", where="messages")
    plain = [_message(message, number) for number, message in enumerate(messages)]
    variables = field(body, "chat_template_kwargs", dict, {})
    if reserved := [name for name in variables if name in RESERVED]:
        raise ModelLinkError(f"chat_template_kwargs must not set {reserved[0]}", where="chat_template_kwargs",
                             fix="remove it")
    return Chat(plain, _tools(body), variables)


def _tools(body: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools that the model may call."""
    tools, choice = field(body, "tools", list, []), body.get("tool_choice")
    for number, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ModelLinkError(f'tool {number} is not {{"type": "function", "function": {{"name": ...}}}}',
                                 where="tools")
        if not isinstance(function.get("parameters", {}), dict):
            raise ModelLinkError(f"the parameters of tool {number} are not a JSON schema", where="tools")
    if choice not in (None, "auto", "none"):
        raise ModelLinkError("tool_choice must be auto or none: forced calls are not supported",
                             where="tool_choice", fix="remove it")
    return None if choice == "none" else tools or None


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ModelLinkError(f"message {number} is not an object with a role", where="messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ModelLinkError(f"message {number} contains a part that is not text", where="messages")
        content = "".join(map(str, parts))
    if content is not None and not isinstance(content, str):
        raise ModelLinkError(f"the content of message {number} is not text", where="messages")
    if message.get("function_call") is not None:
        raise ModelLinkError(f"message {number} has a function_call, which is not supported",
                             where="messages", fix="use tool_calls")
    calls = message.get("tool_calls")
    # null and missing are the same
    plain = {name: value for name, value in message.items() if name != "tool_calls"}
    plain["content"] = content or ""
    if calls:
        plain["tool_calls"] = _calls(calls, number)
    return plain


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls with their arguments, which come as JSON text, as objects: templates write them as
    JSON themselves."""
    wrong = ModelLinkError(f'the tool_calls of message {number} are not a list of '
                           '{"function": {"name": ..., "arguments": ...}}', where="messages")
    if not isinstance(calls, list):
        raise wrong
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ModelLinkError(f"the arguments of {function['name']} in message {number} are not a JSON "
                                 "object",
                                 where="messages")
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found
