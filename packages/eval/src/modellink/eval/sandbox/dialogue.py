"""Two processes that do not trust each other: a candidate holds the program that is judged, a judge holds the test.

The judge never runs a line of the program and the candidate never sees the test, so a program that patches `assert`, `print` or
`==`, leaves early, or looks for the expected results finds nothing to gain: all it can do is to answer calls with plain values.
Each line of the dialogue is a JSON object; values are numbers, texts, bytes, None and lists, tuples, sets and dictionaries of
them, so nothing that crosses over can run.

Only the standard library: this runs inside the sandbox.
"""

from __future__ import annotations

import builtins
import json
import os

TYPE_CHECKING = False  # typing takes its time to import; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LONGEST = 16 << 20  # bytes of one message
SHOWN = 200


class Unfit(Exception):
    """A value that does not cross over, or a message that is none."""


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
            raise Unfit("a message of another form")
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
    raise Unfit("a message of another form")


def say(handle: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    if len(data) > LONGEST:
        raise Unfit("a value too large")
    while data:
        data = data[os.write(handle, data):]


def heard(handle: int) -> Iterator[Any]:
    """Messages from the other side, until it leaves."""
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
    """Runs the program once the judge is out of its reach, then answers calls of its function."""
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
    """Runs the test against a function that asks the candidate, and says how it went."""
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
                raise Unfit("a message of another form")
            if "error" in message:
                raise Unfit(str(message["error"])[:SHOWN])
            if set(message) == {"ready"}:
                return None
            return decode(message["value"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise Unfit("the program sends what is no answer") from None

    try:
        say(told["reply"], {"begin": True})
        answer()
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(told["prompt"], "prompt", "exec"), names)  # of the data set: helpers the test may use
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
    """Do it, and leave without giving anything of the program a chance to run."""
    try:
        (judge if told["role"] == "judge" else candidate)(told)
    finally:
        os._exit(0)
