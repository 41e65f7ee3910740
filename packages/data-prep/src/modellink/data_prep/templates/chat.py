# SPDX-License-Identifier: Apache-2.0
"""Render a tokenizer's own chat template as transformers does, for training, chat and evaluation.

A template is code from the internet and runs in a sandbox; sandbox.py documents what the sandbox contains and what it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from modellink.data_prep.templates.literal import Literals
from modellink.data_prep.tokenizer import SPECIAL_NAMES, Tokenizer
from modellink.kernels.errors import ModelLinkError

Message = Mapping[str, Any]
# Keys of the reasoning before an answer; transformers passes the first two to templates.
REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False,
                tools: Sequence[Mapping[str, Any]] | None = None, template: str | None = None, mark: bool = False,
                today: date | None = None, **variables: Any) -> str:
    """Return the text of a conversation; `encode_chat` returns its ids.

    Args:
        messages: `{"role": ..., "content": ...}` objects, first to last; keys whose value is None count as absent.
        add_generation_prompt: end with the header of an assistant turn.
        tools: JSON schemas of functions the model may call.
        template: the name of one of the tokenizer's templates.
        mark, today: see `render_template`.
        variables: further variables of the template, e.g. `enable_thinking=False`; they override the special tokens.

    Raises:
        ModelLinkError: the template is missing or invalid, refuses the messages, or violates the sandbox.
    """
    from modellink.data_prep.templates.sandbox import render_template  # Jinja, which plain text does not need

    source = tokenizer.chat_template(template, tools=tools is not None)
    if not messages:
        raise ModelLinkError("the conversation is empty", fix="give at least one message")
    return render_template(source, where=f"chat template of {tokenizer.folder}", mark=mark, today=today, messages=[
        _message(message, position) for position, message in enumerate(messages, 1)], tools=tools, documents=None,
        add_generation_prompt=add_generation_prompt, **{**tokenizer.special_tokens, **variables})


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
    """Return the ids of `render_chat` with the same options; control tokens in messages, tools and variables are text."""
    literals = Literals(tokenizer)
    hidden = hide_variables(literals, options)
    return literals.encode(render_chat(tokenizer, [literals.hide(message) for message in messages], **hidden))


def hide_variables(literals: Literals, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `render_chat` with user text hidden; `bos_token` and the like are meant as tokens."""
    kept = ("template", "today", *SPECIAL_NAMES)
    return {name: value if name in kept else literals.hide(value) for name, value in options.items()}


def _message(message: object, position: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ModelLinkError(f"message {position} is a {type(message).__name__}, it must be an object with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    thought = next((kept[name] for name in REASONING if name in kept), None)
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}
