# SPDX-License-Identifier: Apache-2.0
"""The dialogue of two processes that do not trust each other: the candidate runs the generated program, the judge the test.

The judge never runs code of the program and the candidate never sees the test. A program that patches `assert`, `print` or `==`,
exits early or searches for the expected results gains nothing: it can only answer calls with plain values. Each message is a line
with a JSON object; values are numbers, strings, bytes, None, and lists, tuples, sets and dictionaries of them, so nothing that is
exchanged can run.

Only the standard library is imported: this runs inside the sandbox.
"""

from __future__ import annotations

import builtins
import json
import os

TYPE_CHECKING = False  # importing typing is slow; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LONGEST = 16 << 20  # bytes of one message
SHOWN = 200


class Unfit(Exception):
    """A value that cannot be exchanged, or an invalid message."""


def encode(value: Any, depth: int = 0) -> Any:
    if depth > 100:
        raise Unfit("nested too deeply")
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": repr(complex(value))}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    raise Unfit(f"a value of the type {type(value).__name__}")


def decode(value: Any) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, (list, float)):
            raise Unfit("an invalid message")
        return value
    (kind, held), = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in held}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(item) for item in held)
    if kind in ("float", "complex"):
        return getattr(builtins, kind)(held)
    if kind == "bytes":
        return bytes.fromhex(held)
    raise Unfit("an invalid message")


def say(handle: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    if len(data) > LONGEST:
        raise Unfit("a value too large")
    while data:
        data = data[os.write(handle, data):]


def heard(handle: int) -> Iterator[Any]:
    """Yield messages of the other side until it closes the connection."""
    held = b""
    while True:
        piece = os.read(handle, 1 << 16)
        if not piece:
            return
        held += piece
        if len(held) > LONGEST:
            raise Unfit("a message too large")
        *lines, held = held.split(b"\n")
        for line in lines:
            yield json.loads(line)


def candidate(told: dict[str, Any]) -> None:
    """Run the program once the judge is out of its reach, then answer calls of its function."""
    names: dict[str, Any] = {"__name__": "__main__"}
    reply, program, entry = told["reply"], told["program"], told["entry"]
    messages = heard(told["listen"])
    if next(messages, None) is None:
        return
    try:
        exec(compile(program, "program", "exec"), names)
        function = names[entry]
    except BaseException as error:
        say(reply, {"error": _words(error)})
        return
    say(reply, {"ready": True})
    for message in messages:
        try:
            args, kwargs = decode(message["args"]), decode(message["kwargs"])
            answer = {"value": encode(function(*args, **kwargs))}
        except BaseException as error:
            answer = {"error": _words(error)}
        say(reply, answer)


def judge(told: dict[str, Any]) -> None:
    """Run the test against a function that calls the candidate, and report the verdict."""
    messages = heard(told["listen"])

    def ask(*args: Any, **kwargs: Any) -> Any:
        say(told["reply"], {"args": encode(args), "kwargs": encode(kwargs)})
        return answer()

    def answer() -> Any:
        try:
            message = next(messages, None)
            if message is None:
                raise Unfit("the program has ended")
            if not isinstance(message, dict):
                raise Unfit("an invalid message")
            if "error" in message:
                raise Unfit(str(message["error"])[:SHOWN])
            if set(message) == {"ready"}:
                return None
            return decode(message["value"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise Unfit("the program sent an invalid response") from None

    try:
        say(told["reply"], {"begin": True})
        answer()
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(told["prompt"], "prompt", "exec"), names)  # text of the data set: helpers the test may use
        names[told["entry"]] = ask
        exec(compile(told["test"], "test", "exec"), names)
        verdict = "passed"
    except BaseException as error:
        verdict = f"failed: {_words(error)}"
    say(told["verdict"], {"verdict": verdict})


def _words(error: BaseException) -> str:
    text = "" if isinstance(error, AssertionError) else str(error)
    return f"{type(error).__name__}: {text}"[:SHOWN] if text else type(error).__name__


def take_part(told: dict[str, Any]) -> None:
    """Report the verdict and exit without running any code of the program."""
    try:
        (judge if told["role"] == "judge" else candidate)(told)
    finally:
        os._exit(0)
