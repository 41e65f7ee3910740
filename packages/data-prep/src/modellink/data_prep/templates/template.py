# SPDX-License-Identifier: Apache-2.0
"""Named prompt templates: `templates.json` has the texts, a file in the same form adds one (`--template my.json`).

A slot is a list of parts. A text part is encoded on its own; `{content}` in it is replaced by the message (`{idx}` by the number
of the question, from 0). `{"token": ...}` is a token by name, `{"special": "bos"}` or `"eos"` a special token, omitted if the
tokenizer has none. `efficient_eos`: the end token is not written between turns but learned at the first token after an answer,
and written once at the end. `replace_eos`: the first stop word is the end token. `system_in_user`: the system text is part of
the first question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from modellink.data_prep.templates.conversation import ASKED, Conversation, function_calls
from modellink.data_prep.templates.encoded import Encoded, Turn
from modellink.data_prep.templates.literal import Literals
from modellink.data_prep.templates.tools import describe_tools
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.files import read_json

Part = str | dict[str, str]
Kind = tuple[str, Callable[[object], bool]]  # a type of value: its description and its check
SLOTS = ("prefix", "system", "user", "assistant", "observation", "function", "separator")
EOS: Part = {"special": "eos"}
PLAIN: Part = "{content}"
PLACE = re.compile(r"\{(content|idx|name|arguments)\}")


@dataclass(frozen=True)
class Template:
    """The parts of each slot; see the module."""

    name: str
    prefix: list[Part]
    system: list[Part]
    user: list[Part]
    assistant: list[Part]
    observation: list[Part]
    function: list[Part]
    separator: list[Part]
    default_system: str
    stop_words: list[str]
    efficient_eos: bool
    replace_eos: bool
    system_in_user: bool


def load_template(name: str, option: str = "--prompt-type") -> Template:
    """Load a template from `templates.json` or from a file.

    Args:
        option: the option that gave the name; `--template` accepts a file with any extension.

    Raises:
        ModelLinkError: the name is unknown, or the file is not a template.
    """
    path = Path(name)
    if name in _known():
        return _template(name, _known()[name], "templates.json")
    if name.endswith(".json") or (option == "--template" and path.is_file()):
        return _template(path.stem, read_json(path), str(path))
    raise ModelLinkError(f"unknown template {name!r}", where=option,
                         fix=near(name, template_names()) or f"known: {', '.join(template_names())}")


def template_names() -> list[str]:
    return list(_known())


class PromptFormat:
    """A template with a tokenizer. `eos_token_id` ends an answer, `stop_token_ids` end a generation.

    Raises:
        ModelLinkError: the tokenizer lacks a token the template needs.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, template.name
        self.wording = json.dumps(asdict(template), sort_keys=True)
        stops = {word: tokenizer.token_to_id(word) for word in template.stop_words}
        if template.replace_eos:
            self.eos_token_id = self._needed(template.stop_words[0])
        elif tokenizer.eos_token_id is not None:
            self.eos_token_id = tokenizer.eos_token_id
        else:
            self.eos_token_id = self._needed("<|endoftext|>")
        self.stop_token_ids = tuple(dict.fromkeys([self.eos_token_id, *(token for token in stops.values() if token is not None)]))
        for slot in SLOTS:
            for part in getattr(template, slot):
                if isinstance(part, dict) and "token" in part:
                    self._needed(part["token"])

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode a conversation; one that ends with a question is a prompt and has no ending.

        Raises:
            ModelLinkError: a function call or a tool is malformed.
        """
        template, literals = self.template, Literals(self.tokenizer)
        system = conversation.system or template.default_system
        if conversation.tools:
            system += describe_tools(conversation.tools)
        turns: list[Turn] = []
        for index in range(0, len(conversation.turns), 2):
            role, text = conversation.turns[index]
            values = {"content": literals.hide(text), "idx": str(index // 2)}
            source = self._ids(literals, template.separator if index else template.prefix, {})
            if not index and system:
                around = {"content": literals.hide(system)}
                if template.system_in_user:
                    values["content"] = _fill(str(template.system[0]), around) + values["content"]
                else:
                    source += self._ids(literals, template.system, around)
            source += self._ids(literals, template.user if role == "user" else template.observation, values)
            answer = conversation.turns[index + 1] if index + 1 < len(conversation.turns) else None
            target = self._answer(literals, *answer) if answer else []
            turns.append(Turn(source, target, self.eos_token_id if template.efficient_eos and index else None))
        whole = conversation.turns[-1][0] not in ASKED
        return Encoded(turns, [self.eos_token_id] if whole and template.efficient_eos else [])

    def _answer(self, literals: Literals, role: str, text: str) -> list[int]:
        if role == "assistant":
            return self._ids(literals, self.template.assistant, {"content": literals.hide(text)})
        calls = [{"name": literals.hide(call["name"]), "arguments": literals.hide(
            json.dumps(call["arguments"], ensure_ascii=False))} for call in function_calls(text)]
        parts = self.template.function
        found = [_fill(part, call) for call in calls for part in parts if isinstance(part, str)]
        rest: list[Part] = [part for part in parts if not isinstance(part, str)]
        return literals.encode("\n".join(found)) + self._ids(literals, rest, {})

    def _ids(self, literals: Literals, parts: list[Part], values: dict[str, str]) -> list[int]:
        found: list[int] = []
        for part in parts:
            if isinstance(part, str):
                text = _fill(part, values)
                found += literals.encode(text) if text else []
            elif "token" in part:
                found.append(self._needed(part["token"]))
            else:
                special = self.eos_token_id if part["special"] == "eos" else self.tokenizer.bos_token_id
                found += [] if special is None else [special]
        return found

    def _needed(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise ModelLinkError(f"the tokenizer has no token {token!r}, which the template {self.template.name} needs",
                                 where=self.tokenizer.folder, fix="choose the --prompt-type of the model")
        return index


def _fill(part: str, values: dict[str, str]) -> str:
    """Replace placeholders in one pass, so that a brace in a message is never a placeholder."""
    return PLACE.sub(lambda match: values.get(match[1], match[0]), part)


@lru_cache(maxsize=1)
def _known() -> dict[str, dict[str, Any]]:
    text = resources.files("modellink.data_prep.templates").joinpath("templates.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def _template(name: str, values: object, where: str) -> Template:
    if not isinstance(values, dict):
        raise ModelLinkError("a template is an object of slots", where=where)
    known = {field.name for field in fields(Template)} - {"name"}
    if unknown := sorted(set(values) - known):
        raise ModelLinkError(f"unknown key {unknown[0]!r}", where=where, fix=near(unknown[0], sorted(known)) or
                             f"a template has {', '.join(sorted(known))}")
    for key, value in values.items():
        kind, fits = KINDS.get(key, _PARTS)
        if not fits(value):
            raise ModelLinkError(f"{key} is not {kind}", where=where, fix=f"correct {key} or remove it")
    if values.get("replace_eos") and not values.get("stop_words"):
        raise ModelLinkError("replace_eos needs a stop word", where=where)
    system = values.get("system", [PLAIN])
    if values.get("system_in_user") and not (len(system) == 1 and _is_texts(system)):
        raise ModelLinkError("system is not one text, which system_in_user needs", where=where,
                             fix="it is put before the text of the first question: write tokens around it into user")
    eos = [] if values.get("efficient_eos") else [EOS]
    user = values.get("user", [PLAIN])
    slots: dict[str, Any] = {"prefix": [], "system": [PLAIN], "user": user, "assistant": [PLAIN, *eos],
                             "observation": user, "function": ["Action: {name}\nAction Input: {arguments}", *eos],
                             "separator": [], "default_system": "", "stop_words": [], "efficient_eos": False,
                             "replace_eos": False, "system_in_user": False}
    return Template(name, **slots | values)


def _is_part(part: object) -> bool:
    if isinstance(part, dict):
        return part in ({"special": "bos"}, EOS) or (list(part) == ["token"] and isinstance(part["token"], str))
    return isinstance(part, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_PARTS: Kind = ("a list of texts, {\"token\": ...} and {\"special\": ...}",
                lambda value: isinstance(value, list) and all(map(_is_part, value)))
_SWITCH: Kind = ("true or false", lambda value: isinstance(value, bool))
KINDS: dict[str, Kind] = {"default_system": ("a text", lambda value: isinstance(value, str)),
                          "stop_words": ("a list of texts", _is_texts),
                          **dict.fromkeys(("efficient_eos", "replace_eos", "system_in_user"), _SWITCH)}  # all others are slots
