"""A conversation, and the loop that holds one on a terminal.

`/clear` forgets what was said, `/quit` or the end of the input leaves; so do the original's words, `clear` and `new`, and `q`,
`quit` and `exit`, alone on a line. Ctrl-C stops an answer and not the program. On a terminal lines can be edited and earlier ones
come back with the arrow keys.
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
from modellink.infer.request import NoRoom
from modellink.kernels.errors import ModelLinkError

QUIT, CLEAR = ("/quit", "/exit", "q", "quit", "exit"), ("/clear", "clear", "new")
YOU, MODEL = "You >> ", "ModelLink:"
IDLE_SECONDS = 30.0


@dataclass
class Conversation:
    """What was said so far, of which the model sees the last `history_turns` questions and answers.

    `template` says whether a template is put around them, or the texts are joined as they are.
    """

    system: str | None = None
    history_turns: int = 3
    template: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> list[dict[str, str]] | str:
        """The next prompt."""
        head = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.messages = self.messages[-2 * self.history_turns:] if self.history_turns else []
        said = [*head, *self.messages, {"role": "user", "content": text}]
        return said if self.template else "".join(message["content"] for message in said)

    def forget_oldest(self) -> None:
        """Drop the oldest turn."""
        self.messages = self.messages[2:]

    def note(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        self.messages.clear()


def talk(engine: Engine, conversation: Conversation, *, first_rank: bool, **options: Any) -> None:
    """Read questions from stdin and print answers until there are no more. Every rank calls it, the first reads and prints."""
    if first_rank and sys.stdin.isatty():
        with suppress(ImportError):  # a Python that was built without it
            import readline  # noqa: F401  input() edits lines with it
    while (line := engine.network.share(_read(engine) if first_rank else None)) is not None:
        text = line.strip()
        if text in QUIT:
            _say(first_rank, f"{text}: the conversation ends")
            return
        if text in CLEAR:
            conversation.clear()
            _say(first_rank, f"{text}: the conversation is forgotten")
        elif text:
            try:
                stream = _stream(engine, conversation, text, options)
            except ModelLinkError as error:  # too long a question, for one
                if first_rank:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            _show(stream, first_rank)
            conversation.note(text, stream.generation.text)


def _stream(engine: Engine, conversation: Conversation, text: str, options: dict[str, Any]) -> Stream:
    """The answer, after as much of the conversation as leaves room for a whole one; a question that gets none changes nothing."""
    kept, length = conversation.messages, options.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    while conversation.messages:
        try:
            return engine.stream(conversation.ask(text), **options | {"max_new_tokens": length})
        except NoRoom:
            conversation.forget_oldest()
    try:
        return engine.stream(conversation.ask(text), **options)
    except ModelLinkError:
        conversation.messages = kept
        raise


def _say(first_rank: bool, words: str) -> None:
    """On stderr: stdout holds the conversation alone."""
    if first_rank:
        print(words, file=sys.stderr, flush=True)


def _read(engine: Engine) -> str | None:
    """A line from the user; the empty one after Ctrl-C, None at the end of the input."""
    try:
        with _others_wait(engine):
            return input(YOU)
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\n(/quit leaves)")
        return ""


@contextmanager
def _others_wait(engine: Engine) -> Iterator[None]:
    """While the block runs, tell the other ranks every so often that nothing was said: no collective waits for hours."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(IDLE_SECONDS):
            engine.network.share("")
    if engine.network.layout.world_size == 1:
        yield
        return
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _show(stream: Stream, first_rank: bool) -> None:
    with _interrupt(stream):
        if first_rank:
            print(MODEL)
        for piece in stream:
            if first_rank:
                print(piece, end="", flush=True)
    if first_rank:
        stopped = stream.generation.finish_reason == "cancelled"
        print(" (stopped)\n" if stopped else "\n", flush=True)


@contextmanager
def _interrupt(stream: Stream) -> Iterator[None]:
    """Ctrl-C cancels the stream while the block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
