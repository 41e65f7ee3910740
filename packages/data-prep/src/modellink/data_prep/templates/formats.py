# SPDX-License-Identifier: Apache-2.0
"""`chat_format` selects a prompt template; training data, chat and evaluation use it and thus get the same ids.

    form = chat_format(tokenizer, prompt_type="qwen")
    prompt = form.encode(from_messages([{"role": "user", "content": "Hi"}])).ids
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Protocol

from modellink.data_prep.templates.conversation import Conversation
from modellink.data_prep.templates.encoded import Encoded
from modellink.data_prep.templates.model import ModelFormat
from modellink.data_prep.templates.template import PromptFormat, load_template, template_names
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError


class ChatFormat(Protocol):
    """How conversations become ids for one tokenizer.

    Attributes:
        name: the prompt type, or `hf-chat-template`.
        eos_token_id: the token that ends an answer.
        stop_token_ids: the tokens that end a generation.
        wording: the text around messages; formats with different wording give different ids.
    """

    name: str
    wording: str
    eos_token_id: int
    stop_token_ids: tuple[int, ...]

    def encode(self, conversation: Conversation) -> Encoded: ...


def chat_format(tokenizer: Tokenizer, prompt_type: str | None = None, template: Path | str | None = None,
                hf_chat_template: bool = False, today: date | None = None) -> ChatFormat:
    """Return the format named by exactly one of the three arguments.

    Args:
        prompt_type: a name in `templates.json`.
        template: such a name, or a file in the form of one entry.
        hf_chat_template: use the tokenizer's own template.
        today: date for templates that print it. Default: the date of use.

    Raises:
        ModelLinkError: none or several are given, the template is unknown, or the tokenizer lacks its tokens.
    """
    given = [name for name, value in (("--prompt-type", prompt_type), ("--template", template),
                                      ("--hf-chat-template", hf_chat_template)) if value]
    if len(given) != 1:
        raise ModelLinkError(f"{' and '.join(given)} exclude each other" if given else "no template is given",
                             where="--prompt-type", fix=f"give --prompt-type (one of {', '.join(template_names())}), --template "
                             "FILE.json or --hf-chat-template")
    if hf_chat_template:
        return ModelFormat(tokenizer, today=today)
    return PromptFormat(tokenizer, load_template(str(prompt_type or template), given[0]))
