# SPDX-License-Identifier: Apache-2.0
"""A conversation, and the loop that holds it on a terminal.

`/clear` forgets the conversation; `/quit` or the end of the input exits. The original's words work too, on a
line of their own: `clear` and `new`, `q`, `quit` and `exit`. Ctrl-C stops the current answer, not the
program. On a terminal, lines can be edited and recalled with the arrow keys.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from modellink.infer.engine import Engine, Stream
from modellink.infer.prompts import DEFAULT_NEW_TOKENS
from modellink.infer.request import SequenceTooLong
from modellink.kernels.errors import ModelLinkError

QUIT, CLEAR = ("/quit", "/exit", "q", "quit", "exit"), ("/clear", "clear", "new")
USER_PROMPT, MODEL_HEADING = "You >> ", "ModelLink:"
IDLE_SECONDS = 30.0


@dataclass
class Conversation:
    """The messages so far; the prompt contains the last `history_turns` turns.

    Attributes:
        use_template: apply the chat template, else join the texts.
    """

    system: str | None = None
    history_turns: int = 3
    use_template: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> list[dict[str, str]] | str:
        """Return the prompt for the next user message; drops turns beyond the history."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.messages = self.messages[-2 * self.history_turns:] if self.history_turns else []
        messages = [*system, *self.messages, {"role": "user", "content": text}]
        return messages if self.use_template else "".join(message["content"] for message in messages)

    def drop_oldest(self) -> None:
        """Drop the oldest turn."""
        self.messages = self.messages[2:]

    def add(self, text: str, answer: str) -> None:
        """Add a turn."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        self.messages.clear()


def chat_loop(engine: Engine, conversation: Conversation, *, first_rank: bool, **arguments: Any) -> None:
    """Read user messages from stdin and print answers until the input ends. Every rank calls it; the first
    reads and prints."""
    if first_rank and sys.stdin.isatty():
        with suppress(ImportError):  # Python may be built without it
            import readline  # noqa: F401  input() uses it to edit lines
    while (line := engine.network.broadcast(_read(engine) if first_rank else None)) is not None:
        text = line.strip()
        if text in QUIT:
            _report(first_rank, f"{text}: the conversation ends")
            return
        if text in CLEAR:
            conversation.clear()
            _report(first_rank, f"{text}: the conversation is cleared")
        elif text:
            try:
                stream = _stream(engine, conversation, text, arguments)
            except ModelLinkError as error:  # for example, the message is too long
                _report(first_rank, f"error: {error}")
                continue
            _show(stream, first_rank)
            conversation.add(text, stream.generation.text)


def _stream(engine: Engine, conversation: Conversation, text: str, arguments: dict[str, Any]) -> Stream:
    """Return the answer to a message. Drops old turns until an answer of full length fits; on an error drops
    none."""
    kept, length = conversation.messages, arguments.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    while conversation.messages:
        try:
            return engine.stream(conversation.prompt(text), **arguments | {"max_new_tokens": length})
        except SequenceTooLong:
            conversation.drop_oldest()
    try:
        return engine.stream(conversation.prompt(text), **arguments)
    except ModelLinkError:
        conversation.messages = kept
        raise


def _report(first_rank: bool, text: str) -> None:
    """Print to stderr, so that stdout holds only the conversation."""
    if first_rank:
        print(text, file=sys.stderr, flush=True)


def _read(engine: Engine) -> str | None:
    """Return a line from the user; an empty one after Ctrl-C, None at the end of the input."""
    try:
        with _keep_ranks_alive(engine):
            return input(USER_PROMPT)
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(/quit exits)")
        return ""


@contextmanager
def _keep_ranks_alive(engine: Engine) -> Iterator[None]:
    """Send the other ranks an empty message at intervals while the block runs, so that no collective times
    out."""
    done = threading.Event()

    def send() -> None:
        while not done.wait(IDLE_SECONDS):
            engine.network.broadcast("")
    if engine.network.layout.world_size == 1:
        yield
        return
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()


def _show(stream: Stream, first_rank: bool) -> None:
    with _interruptible(stream):
        if first_rank:
            print(MODEL_HEADING)
        for piece in stream:
            if first_rank:
                print(piece, end="", flush=True)
    if first_rank:
        stopped = stream.generation.finish_reason == "cancelled"
        print(" (stopped)\n" if stopped else "\n", flush=True)


@contextmanager
def _interruptible(stream: Stream) -> Iterator[None]:
    """Let Ctrl-C cancel the stream while the block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
