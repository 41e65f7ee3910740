"""How a conversation becomes the token ids a model reads: the ones it was trained with, because data-prep makes both.

A prompt type is a name of data-prep's templates, a JSON file of the same form, or `hf-chat-template`, the tokenizer's own. Not
here: what is said; see chat.py.
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
    """A conversation that is to be answered.

    Attributes:
        messages: with role and content, first to last.
        tools: JSON schemas of functions the model may call.
        variables: further names the tokenizer's own template knows, e.g. `enable_thinking`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def named_format(tokenizer: Tokenizer, prompt_type: str | None) -> ChatFormat | None:
    """The template of a prompt type; None for the tokenizer's own.

    Raises:
        ModelLinkError: there is no such template, or the tokenizer lacks one of its tokens.
    """
    if prompt_type in (None, HF_CHAT_TEMPLATE):
        return None
    return chat_format(tokenizer, prompt_type)


def encode_prompt(tokenizer: Tokenizer, chat: Chat, prompt_type: str | None = None) -> tuple[list[int], tuple[int, ...]]:
    """Token ids up to where the model speaks, and the ids that end what it says beside the checkpoint's end tokens.

    Raises:
        ModelLinkError: no template, or one that does not take these messages.
    """
    form = named_format(tokenizer, prompt_type)
    if form is None:
        extra = {"tools": chat.tools} if chat.tools else {}
        return encode_chat(tokenizer, chat.messages, add_generation_prompt=True, **extra, **chat.variables), ()
    if chat.variables:
        raise ModelLinkError(f"the prompt type {form.name} knows no variables ({', '.join(chat.variables)})",
                             where="chat_template_kwargs", fix="leave them out, or use the tokenizer's own template")
    conversation = from_messages(chat.messages, chat.tools)
    if not conversation.ends_with_question:
        raise ModelLinkError("the conversation does not end with something to answer", where="messages",
                             fix="end it with a message of the user")
    return form.encode(conversation).ids, form.stop_token_ids
