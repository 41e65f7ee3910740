# SPDX-License-Identifier: Apache-2.0
"""Parse rows into conversations: one function per style. A bad row raises a ValueError that describes the fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modellink.data_prep.handlers.fields import FieldMap
from modellink.data_prep.templates.conversation import Conversation, order_problem, tool_list


@dataclass
class Sample:
    """A conversation, and for a ranking row the two answers to its last question as (role, text)."""

    conversation: Conversation
    chosen: tuple[str, str] | None = None
    rejected: tuple[str, str] | None = None

    @property
    def has_gap(self) -> bool:
        """Return whether a question or an answer is empty. The result of a tool may be empty."""
        said = (*self.conversation.turns, *filter(None, (self.chosen, self.rejected)))
        return any(role in ("user", "assistant") and not text.strip() for role, text in said)


def alpaca(row: Mapping[str, Any], names: FieldMap) -> Sample:
    """Parse instruction, input and output; history is a list of earlier (question, answer) pairs."""
    prompt = _joined(row, names, "prompt")
    if end := names.extra.get("prompt_ends_at"):
        prompt = prompt.split(end, 1)[0].strip()
    query = _optional(row, names, "query")
    turns: list[tuple[str, str]] = []
    for pair in _listed(row.get(_one(names, "history")), "history"):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError("history is not a list of questions and answers")
        turns += [("user", text_of(pair[0], "history")), ("assistant", text_of(pair[1], "history"))]
    turns.append(("user", "\n".join(text for text in (prompt, query) if text)))
    conversation = Conversation(turns, _optional(row, names, "system"))
    if not names.ranking:
        turns.append(("assistant", _joined(row, names, "response")))
        return Sample(conversation)
    answers = [_answer(row, names, meaning, place) for place, meaning in enumerate(("chosen", "rejected"))]
    return Sample(conversation, ("assistant", answers[0]), ("assistant", answers[1]))


def sharegpt(row: Mapping[str, Any], names: FieldMap) -> Sample:
    """Parse a list of messages; questions and answers alternate, after an optional system message."""
    column = _one(names, "messages")
    messages = _listed(row.get(column), column)
    turns = [_message(message, names) for message in messages]
    system = _optional(row, names, "system")
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    conversation = Conversation(turns, system, tool_list(row.get(_one(names, "tools"))))
    if problem := order_problem(turns):
        raise ValueError(problem)
    if conversation.ends_with_question != names.ranking:
        raise ValueError("the last message is from the assistant" if names.ranking else "the last message is not answered")
    if not names.ranking:
        return Sample(conversation)
    answers = []
    for meaning in ("chosen", "rejected"):
        value = row.get(_one(names, meaning))
        role, text = _message(value, names) if isinstance(value, Mapping) else ("assistant", text_of(value, meaning))
        if role not in ("assistant", "function"):
            raise ValueError(f"{meaning} is from {role}")
        answers.append((role, text))
    return Sample(conversation, answers[0], answers[1])


def spoken(row: Mapping[str, Any], names: FieldMap) -> Sample:
    """Parse a conversation in one text, with a marker before each turn; the last answer has its own column."""
    user, assistant = names.extra["user_mark"], names.extra["assistant_mark"]
    turns: list[tuple[str, str]] = []
    for part in _joined(row, names, "prompt").split(user):
        if part.strip():
            question, _, answer = part.partition(assistant)
            turns += [("user", question.strip()), ("assistant", answer.strip())]
    if not turns or turns[-1][1]:
        raise ValueError(f"the text does not end with a question ({user} ... {assistant})")
    turns[-1] = ("assistant", _joined(row, names, "response").strip())
    return Sample(Conversation(turns))


def moss(row: Mapping[str, Any], names: FieldMap) -> Sample:
    """Parse `chat`: turns by name, each with `Human` and `MOSS` and their markers."""
    chat = row.get(_one(names, "messages"))
    if not isinstance(chat, Mapping) or not chat:
        raise ValueError("chat is not an object of turns")
    turns: list[tuple[str, str]] = []
    for turn in chat.values():
        if turn:
            if not isinstance(turn, Mapping):
                raise ValueError("a turn is not an object")
            human, answer = (text_of(turn.get(name), name) for name in ("Human", "MOSS"))
            turns += [("user", human.replace("<eoh>", "").replace("<|Human|>: ", "").strip()),
                      ("assistant", answer.replace("<|MOSS|>:", "").replace("<eom>", "").strip())]
    return Sample(Conversation(turns))


STYLES: dict[str, Callable[[Mapping[str, Any], FieldMap], Sample]] = {
    "alpaca": alpaca, "sharegpt": sharegpt, "spoken": spoken, "moss": moss}


def text_of(value: object, name: str) -> str:
    """Return a value that must be a text; raise ValueError with its type otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {'empty (null)' if value is None else f'a {type(value).__name__}'}, not a text")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} is not UTF-8") from None
    return value


def _one(names: FieldMap, meaning: str) -> str:
    column = names.columns.get(meaning) or ""
    return column if isinstance(column, str) else column[0]


def _joined(row: Mapping[str, Any], names: FieldMap, meaning: str) -> str:
    column = names.columns[meaning]
    texts = []
    for name in [column] if isinstance(column, str) else column:
        if name not in row:
            raise ValueError(f"the row has no {name!r}")
        value = row[name]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        texts.append(text_of(value, name))
    return "\n".join(texts)


def _optional(row: Mapping[str, Any], names: FieldMap, meaning: str) -> str:
    column = _one(names, meaning)
    value = row.get(column) if column else None
    return text_of(value, column) if value is not None else ""


def _answer(row: Mapping[str, Any], names: FieldMap, meaning: str, place: int) -> str:
    """Return an answer: a text, a list with one text, or the matching text of a list with both answers."""
    column = _one(names, meaning)
    value = row.get(column)
    if isinstance(value, list):
        both = names.columns["chosen"] == names.columns["rejected"]
        if len(value) != (2 if both else 1):
            raise ValueError(f"{column!r} holds {len(value)} answers")
        value = value[place if both else 0]
    return text_of(value, column)


def _listed(value: object, name: str) -> list[Any]:
    """Return a list; text files have it as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError:
            raise ValueError(f"{name!r} is a text but not a JSON list") from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a list")
    return value


def _message(message: object, names: FieldMap) -> tuple[str, str]:
    tags = names.tags
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["observation_tag"]: "tool",
             tags["function_tag"]: "function", tags["system_tag"]: "system"}
    if not isinstance(message, Mapping) or tags["role_tag"] not in message:
        raise ValueError(f"a message has no {tags['role_tag']!r}")
    spoken = message[tags["role_tag"]]
    role = roles.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise ValueError(f"a message is from {message[tags['role_tag']]!r}, known are {', '.join(roles)}")
    return role, text_of(message.get(tags["content_tag"]), tags["content_tag"])
