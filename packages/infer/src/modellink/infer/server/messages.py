"""The messages and tools of a chat as a chat template takes them: contents are texts, arguments of calls are objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modellink.data_prep import Tokenizer
from modellink.infer.server.fields import field
from modellink.infer.template import Chat
from modellink.kernels.errors import ModelLinkError

OURS = ("tokenizer", "messages", "tools", "documents", "add_generation_prompt", "template", "mark", "source", "where")


def read_chat(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> Chat:
    """The conversation of a body, with its tools.

    Raises:
        ModelLinkError: a message or a tool has another shape than the API says, or there is no template.
    """
    messages = field(body, "messages", list)
    if not messages:
        raise ModelLinkError("there are no messages", where="messages")
    if tokenizer is None:
        raise ModelLinkError("the checkpoint carries no tokenizer, so there is no chat template", where="messages")
    plain = [_message(message, number) for number, message in enumerate(messages)]
    extra = field(body, "chat_template_kwargs", dict, {})
    if ours := [name for name in extra if name in OURS]:
        raise ModelLinkError(f"chat_template_kwargs holds {ours[0]}, which the server says itself", where="chat_template_kwargs")
    return Chat(plain, _tools(body), extra)


def _tools(body: Mapping[str, Any]) -> list[Any] | None:
    """The tools the model is told of; it is free to call one or none."""
    tools, choice = field(body, "tools", list, []), body.get("tool_choice")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ModelLinkError(f'tool {number} is not {{"type": "function", "function": {{"name": ...}}}}', where="tools")
        if not isinstance(function.get("parameters", {}), dict):
            raise ModelLinkError(f"the parameters of tool {number} are no JSON schema", where="tools")
    if choice not in (None, "auto", "none"):
        raise ModelLinkError("tool_choice must be auto or none: a call cannot be forced", where="tool_choice", fix="leave it out")
    return None if choice == "none" else tools or None


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ModelLinkError(f"message {number} is no object with a role", where="messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ModelLinkError(f"message {number} holds a part that is no text", where="messages")
        content = "".join(map(str, parts))
    if content is not None and not isinstance(content, str):
        raise ModelLinkError(f"the content of message {number} is no text", where="messages")
    if message.get("function_call") is not None:
        raise ModelLinkError(f"message {number} has a function_call", where="messages", fix="write it as tool_calls")
    calls = message.get("tool_calls")
    rest = {name: value for name, value in message.items() if name != "tool_calls"}  # null and none are the same
    return {**rest, "content": content or ""} | ({"tool_calls": _calls(calls, number)} if calls else {})


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls of functions; their arguments come as JSON text, templates write them as JSON themselves."""
    wrong = ModelLinkError(f'the tool_calls of message {number} are no list of {{"function": {{"name": ..., "arguments": ...}}}}',
                           where="messages")
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
            raise ModelLinkError(f"the arguments of {function['name']} in message {number} are not a JSON object",
                                 where="messages")
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found
