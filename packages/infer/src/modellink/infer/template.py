# SPDX-License-Identifier: Apache-2.0
"""Renders a conversation to token ids, by the same templates that data-prep uses for training data.

A prompt type is the name of one of data-prep's templates, a JSON file in the same format, or
`hf-chat-template`, the tokenizer's own. Not here: the conversation itself; see chat.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modellink.data_prep import ChatFormat, Tokenizer, chat_format, encode_chat, from_messages
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError


@dataclass(frozen=True)
class Chat:
    """A conversation that the model is to continue.

    Attributes:
        messages: with role and content, first to last.
        tools: JSON schemas of functions the model may call.
        variables: additional variables of the tokenizer's own template, e.g. `enable_thinking`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def find_format(tokenizer: Tokenizer, prompt_type: str | None) -> ChatFormat | None:
    """Return the format of a prompt type; None for the tokenizer's own template.

    Raises:
        ModelLinkError: the template does not exist, or the tokenizer lacks one of its tokens.
    """
    if prompt_type in (None, HF_CHAT_TEMPLATE):
        return None
    return chat_format(tokenizer, prompt_type)


def encode_chat_prompt(tokenizer: Tokenizer, chat: Chat,
                       prompt_type: str | None = None) -> tuple[list[int], tuple[int, ...]]:
    """Return the token ids up to the model's turn, and the ids that end the turn in addition to the
    checkpoint's end tokens.

    Raises:
        ModelLinkError: there is no template, or it does not accept these messages.
    """
    chosen = find_format(tokenizer, prompt_type)
    if chosen is None:
        tools = {"tools": chat.tools} if chat.tools else {}
        return encode_chat(tokenizer, chat.messages, add_generation_prompt=True, **tools,
                           **chat.variables), ()
    if chat.variables:
        raise ModelLinkError(f"the prompt type {chosen.name} has no variables, but "
                             f"{', '.join(chat.variables)} is set",
                             where="chat_template_kwargs",
                             fix="remove them, or use the tokenizer's own template")
    conversation = from_messages(chat.messages, chat.tools)
    if not conversation.ends_with_question:
        raise ModelLinkError("the last message is not one that the model can answer", where="messages",
                             fix="end the conversation with a user message")
    return chosen.encode(conversation).ids, chosen.stop_token_ids
