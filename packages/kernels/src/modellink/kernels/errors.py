# SPDX-License-Identifier: Apache-2.0
"""How every package fails: one exception, the exit statuses, and the one place that prints errors.

A message says what is wrong, where, and how to fix it. A user's mistake ends with status 2 and no traceback,
a bug of ours with status 1 and a traceback. Not here: retrying, logging, and warnings.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from typing import NoReturn

import click

from modellink.kernels import dependency_warnings
from modellink.kernels.messages import is_under_our_launcher, let_first_rank_report

USER_MISTAKE, OUR_FAULT, INTERRUPTED = 2, 1, 130
SYSTEM_ERRORS = {errno.ENOSPC: "free some space, or choose another disk",
                 errno.EDQUOT: "free some space: the disk quota is used up",
                 errno.EROFS: "choose a folder that can be written",
                 errno.EACCES: "choose another path, or ask for permission",
                 errno.EPERM: "choose another path, or ask for permission",
                 errno.EMFILE: "raise the limit on open files (ulimit -n)"}
"""errno values that are not a bug of ours in any command, and how to fix each."""
CLOSE, AS_CLOSE = 0.6, 0.05  # lowest similarity of a suggestion, and its largest distance from the nearest name
FLAG = re.compile(r"--([a-z0-9][a-z0-9-]*)$")


class ModelLinkError(Exception):
    """An error that the user can fix.

    Args:
        what: one sentence, with the offending values.
        where: the file, option, tensor or row it concerns.
        fix: what to do about it.
        option: field name of the option at fault, e.g. `max_new_tokens`. Default: the option that `where`
            names, if `where` is a single option such as `--max-new-tokens`.
    """

    exit_status = USER_MISTAKE

    def __init__(self, what: str, *, where: object = None, fix: str | None = None,
                 option: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        self.option = option or _named(where)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # the default pickling drops keyword-only arguments
        where = None if self.where is None else str(self.where)
        return _rebuild, (type(self), self.what, where, self.fix, self.option)


def _named(where: object) -> str | None:
    found = FLAG.match(where) if isinstance(where, str) else None
    return found[1].replace("-", "_") if found else None


def _rebuild(cls: type[ModelLinkError], what: str, where: str | None, fix: str | None,
             option: str | None) -> ModelLinkError:
    return cls(what, where=where, fix=fix, option=option)


class InternalError(ModelLinkError):
    """An error that only a developer of ModelLink can fix."""

    exit_status = OUR_FAULT


def near(name: str, known: Collection[str]) -> str:
    """Return `did you mean ...?` for a misspelled name, or an empty string if no known name is close.

    Only names about as close as the nearest one are suggested.
    """
    close = get_close_matches(name, list(known), n=3, cutoff=CLOSE)
    ratios = {other: SequenceMatcher(a=other, b=name).ratio() for other in close}
    best = [other for other, ratio in ratios.items() if ratio >= max(ratios.values()) - AS_CLOSE]
    return f"did you mean {' or '.join(best)}?" if best else ""


def _usage_error(error: click.ClickException) -> ModelLinkError:
    """Return what click found wrong with a command line as an error in our format."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    usage = f"see {context.command_path} --help" if context else "see --help"
    message = error.message.rstrip(".")
    option = None
    if isinstance(error, click.NoSuchOption):
        option = error.option_name.lstrip("-").replace("-", "_")
        message, known = f"unknown option {error.option_name}", _flags(context)
        usage = near(error.option_name.replace("_", "-"), known) or usage
    elif isinstance(error, click.MissingParameter) and error.param is not None:
        option, what = _parameter(error.param)
        message = f"{what} is required"
        if context:
            usage = " ".join([context.command_path, *context.command.collect_usage_pieces(context)])
    elif isinstance(error, click.BadOptionUsage):
        option = error.option_name.lstrip("-").replace("-", "_")
        message = f"{error.option_name} needs a value"
    elif isinstance(error, click.BadParameter) and error.param is not None:
        option, what = _parameter(error.param)
        message = f"{what}: {message[:1].lower()}{message[1:]}"
    elif found := re.match(r"Got unexpected extra arguments? \((.*)\)", message):
        message = f"unexpected argument {found[1]}"
    elif found := re.match(r"No such command '(.*)'", message):
        message = f"unknown command {found[1]}"
        usage = near(found[1], _commands(context)) or usage
    return ModelLinkError(message, where="command line", fix=usage, option=option)


def _parameter(parameter: click.Parameter) -> tuple[str | None, str]:
    """Return (field name, or None for an argument; what the user calls it)."""
    if isinstance(parameter, click.Option):
        return parameter.name, max(parameter.opts, key=len).replace("_", "-")
    return None, parameter.make_metavar(click.Context(click.Command(None))).strip("[].")


def _flags(context: click.Context | None) -> list[str]:
    parameters = context.command.params if context else []
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    names = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    return sorted({name for name in names if name.startswith("--") and "_" not in name})


def _commands(context: click.Context | None) -> list[str]:
    command = context.command if context else None
    return command.list_commands(context) if context and isinstance(command, click.Group) else []


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise a ModelLinkError for an error of the operating system that is not a bug of ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        raise ModelLinkError(str(error.strerror), where=error.filename,
                             fix=SYSTEM_ERRORS[error.errno]) from error


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Raise a ModelLinkError for a command line that click refuses."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # it prints the help text
        raise
    except click.ClickException as error:
        raise _usage_error(error) from None


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run the body of a console command and exit with its status.

    Errors go to stderr; ranks that have the same one print it once (see messages.py). `MODELLINK_TRACE=1`
    prints the traceback of a user's mistake too.
    """
    dependency_warnings.ignore()
    try:
        with _system_errors(), _usage_errors():
            command()
            sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except ModelLinkError as error:
        let_first_rank_report()
        if error.exit_status != USER_MISTAKE or os.environ.get("MODELLINK_TRACE"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if not is_under_our_launcher():  # the launcher is interrupted too, and prints it
            let_first_rank_report()
            print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) exited: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        let_first_rank_report()
        traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}: {error}\n  fix:   this is a bug in ModelLink; "
              f"please report it with "
              "the traceback above", file=sys.stderr)
        sys.exit(OUR_FAULT)
    sys.exit(0)
