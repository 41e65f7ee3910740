"""How every package fails: one exception, two exit statuses, and the one place that prints them.

A message says what is wrong, where, and what to do about it. A user's mistake ends with status 2 and no trace; a fault of
ours ends with status 1 and a trace. Not here: retrying, logging, and warnings.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

import click

USER_MISTAKE, OUR_FAULT, INTERRUPTED = 2, 1, 130
REFUSALS = {errno.ENOSPC: "make room, or choose another disk", errno.EDQUOT: "make room: the quota is used up",
            errno.EROFS: "choose a folder that can be written", errno.EACCES: "choose another place, or ask for the right to it",
            errno.EPERM: "choose another place, or ask for the right to it", errno.EMFILE: "raise the limit (ulimit -n)"}
"""What the system may refuse any command at any moment, and what to do about it."""


class ModelLinkError(Exception):
    """Something the user can mend.

    Args:
        what: one sentence, with the values that do not fit.
        where: file, option, tensor or row it concerns.
        fix: what to do.
    """

    exit_status = USER_MISTAKE

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickling between processes
        return _rebuild, (type(self), self.what, None if self.where is None else str(self.where), self.fix)


def _rebuild(cls: type[ModelLinkError], what: str, where: str | None, fix: str | None) -> ModelLinkError:
    return cls(what, where=where, fix=fix)


class InternalError(ModelLinkError):
    """Something only a developer of ModelLink can mend."""

    exit_status = OUR_FAULT


def near(name: str, known: list[str]) -> str:
    """`did you mean ...?` for a misspelt name, or the empty string."""
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


@contextmanager
def _refusals() -> Iterator[None]:
    """What the system refused is no fault of ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise ModelLinkError(str(error.strerror), where=error.filename, fix=REFUSALS[error.errno]) from error


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run the body of a console command and leave the process with its exit status.

    Output goes to stderr. `MODELLINK_TRACE=1` shows the trace of a user's mistake too.
    """
    try:
        with _refusals():
            command()
            sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except ModelLinkError as error:
        if error.exit_status != USER_MISTAKE or os.environ.get("MODELLINK_TRACE"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}: {error}\n  fix:   this is a fault of ModelLink; please report "
              "it with the trace above", file=sys.stderr)
        sys.exit(OUR_FAULT)
    sys.exit(0)
