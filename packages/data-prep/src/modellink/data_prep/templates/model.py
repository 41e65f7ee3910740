# SPDX-License-Identifier: Apache-2.0
"""The model's own chat template (`--hf-chat-template`) as a format: ids, and which of them are the assistant's.

If a template has `{% generation %}`, the text inside is learned. Otherwise an answer begins where its prompt ends, and ends with
the first end token after that, or with the first control token if the tokenizer names another end token than its template uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from itertools import groupby
from typing import Any

from modellink.data_prep.templates.chat import hide_variables, render_chat
from modellink.data_prep.templates.conversation import Conversation
from modellink.data_prep.templates.encoded import Encoded, Turn
from modellink.data_prep.templates.literal import BEGIN, END, Literals
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.constants import HF_CHAT_TEMPLATE
from modellink.kernels.errors import ModelLinkError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ModelFormat:
    """A tokenizer's chat template; see `PromptFormat` for the attributes.

    Args:
        template: the name of one of the tokenizer's templates.
        today: see `render_chat`.
        variables: further variables of the template, e.g. `enable_thinking=False`.

    Raises:
        ModelLinkError: the tokenizer lacks the template or an end token.
    """

    name = HF_CHAT_TEMPLATE

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, today: date | None = None, **variables: Any) -> None:
        # A tokenizer may have a separate template for conversations with tools.
        self._sources = {tools: tokenizer.chat_template(template, tools=tools) for tools in (False, True)}
        self.wording = "\n".join(dict.fromkeys(self._sources.values()))
        if tokenizer.eos_token_id is None:
            raise ModelLinkError("the tokenizer has no end token", where=tokenizer.folder,
                                 fix="set eos_token in its tokenizer_config.json")
        self.tokenizer, self._template, self._today, self._variables = tokenizer, template, today, variables
        self.eos_token_id, self.stop_token_ids = tokenizer.eos_token_id, tokenizer.eos_token_ids

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode a conversation; one that ends with a question is a prompt.

        Raises:
            ModelLinkError: the template refuses it or fails, or the answers cannot be located.
        """
        literals = Literals(self.tokenizer)
        messages = literals.hide(conversation.messages())
        tools = literals.hide([{"type": "function", "function": tool} for tool in conversation.tools]) or None
        variables = hide_variables(literals, self._variables)
        marked = self._is_marked(tools)
        text = self._render(messages, tools, conversation.ends_with_question, variables)
        spans: list[tuple[int, int]] = []
        if conversation.ends_with_question:
            text = self._unmarked(text)[0] if marked else text
        elif marked:
            text, spans = self._unmarked(text)
        else:
            spans = self._answers(messages, tools, text, variables)
        turns: list[Turn] = []
        for is_learned, group in groupby(literals.encode_marked(text, spans), key=lambda item: item[1]):
            ids = [index for index, _ in group]
            if not is_learned:
                turns.append(Turn(ids, []))
            else:
                source = turns.pop().source if turns and not turns[-1].target else []
                turns.append(Turn(source, ids))
        if not conversation.ends_with_question and not any(turn.target for turn in turns):
            raise ModelLinkError("the chat template marks no answer in this conversation", where=self.tokenizer.folder,
                                 fix="put {% generation %} around the assistant's text there too, or use --prompt-type")
        return Encoded(turns)

    def _is_marked(self, tools: Any) -> bool:
        return bool(GENERATION.search(self._sources[tools is not None]))

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool, variables: dict[str, Any]) -> str:
        return render_chat(self.tokenizer, messages, tools=tools, template=self._template, add_generation_prompt=prompt,
                           mark=self._is_marked(tools), today=self._today, **variables)

    @staticmethod
    def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
        plain, spans = "", []
        for position, piece in enumerate(re.split(f"[{BEGIN}{END}]", text)):
            if position % 2 and piece:
                spans.append((len(plain), len(plain) + len(piece)))
            plain += piece
        return plain, spans

    def _answers(self, messages: list[dict[str, Any]], tools: Any, text: str,
                 variables: dict[str, Any]) -> list[tuple[int, int]]:
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        starts = []
        for index in places:
            prompt = self._render(messages[:index], tools, True, variables)
            if not text.startswith(prompt):
                raise self._unclear(index, "the conversation does not begin with its prompt")
            starts.append(len(prompt))
        ends = [token for index in self.stop_token_ids if (token := self.tokenizer.id_to_token(index))]
        spans: list[tuple[int, int]] = []
        for index, start, limit in zip(places, starts, [*starts[1:], len(text)], strict=True):
            stop = _first(text, ends, start, limit) or _first(text, self.tokenizer.control_tokens, start, limit)
            if stop:
                spans.append((start, stop))
                continue
            whole = self._render(messages[:index + 1], tools, False, variables)
            if not text.startswith(whole) or len(whole) > limit:
                raise self._unclear(index, "no end token follows it")
            spans.append((start, len(whole)))
        return spans

    def _unclear(self, index: int, why: str) -> ModelLinkError:
        return ModelLinkError(f"the chat template does not show where answer {index + 1} is: {why}", where=self.tokenizer.folder,
                              fix="use --prompt-type, or mark answers in the template with {% generation %}")


def _first(text: str, tokens: Iterable[str], start: int, limit: int) -> int:
    """Return the end of the first of the tokens between `start` and `limit`, or 0."""
    found = [at + len(token) for token in tokens if (at := text.find(token, start, limit)) >= 0]
    return min(found, default=0)
