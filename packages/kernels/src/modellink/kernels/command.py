# SPDX-License-Identifier: Apache-2.0
"""Console commands made from config classes: options, help in groups, `--version` and `--dry-run`.

Not here: declaring and merging options (options.py), the options that every command has (general_options.py), and how
errors are printed (errors.py).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from modellink.kernels.errors import USER_MISTAKE
from modellink.kernels.general_options import GENERAL, DryRun
from modellink.kernels.options import Field, Layer, fields_of, resolve

_NUMBER = re.compile(r"-?\d*\.?\d+(e-?\d+)?$")
METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH"}
LONGEST = 74  # characters of an option with its choices
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class ConfigOption(click.Option):
    """The click option of a field; the help text shows the flag and its short spelling."""

    def __init__(self, item: Field) -> None:
        names = [item.name, item.flag, *item.aliases]
        if "_" in item.name and item.kind is not bool:
            names.append("--" + item.name)
        shown = f"{item.about.short}, {item.flag}" if item.about.short else item.flag
        if item.kind is bool:
            opposite = f"--no-{item.flag[2:]}"
            names[1] = f"{item.flag}/{opposite}"
            super().__init__(names, default=None, help=_help(item), hidden=not item.about.listed)
            pair = f"{shown} / {opposite}"
            if len(pair) > LONGEST:
                pair = f"--[no-]{item.flag[2:]}"
            self._shown = shown if item.default is False else pair
            return
        text, label = _help(item), METAVARS.get(item.kind, "TEXT")
        if isinstance(item.kind, tuple):
            label = f"[{'|'.join(map(str, item.kind))}]"
        if len(shown) + len(label) > LONGEST:
            text, label = f"One of {', '.join(item.kind)}. {text}", "NAME"
        metavar = f"{label}..." if item.many else label
        super().__init__(names, default=None, multiple=item.many, help=text, type=click.STRING, metavar=metavar,
                         hidden=not item.about.listed)
        self._shown = f"{shown} {metavar}"

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return None if self.hidden else (self._shown, self.help or "")


def _help(item: Field) -> str:
    """Return the sentence of an option with its unit and default."""
    notes = [item.about.unit] if item.about.unit else []
    if item.required:
        notes.append(item.required)
    elif item.kind is bool and item.default:
        notes.append("default: on")
    elif item.kind is not bool and item.default not in (None, ()):
        values = item.default if isinstance(item.default, tuple) else (item.default,)
        notes.append(f"default: {','.join(map(str, values))}")
    return item.about.doc + (f"  [{', '.join(notes)}]" if notes else "")


class _Explained:
    """The parts of a help text that commands and groups share: the example, and `--version`."""

    example: str | None
    distribution: str | None

    def _version_option(self) -> click.Option:
        def show(context: click.Context, _: click.Parameter, given: bool) -> None:
            if given and not context.resilient_parsing:
                assert self.distribution is not None
                program = str(context.find_root().info_name).split()[0]  # without a subcommand
                print(f"{program} {version(self.distribution)}")
                context.exit()
        return click.Option(["--version"], is_flag=True, expose_value=False, is_eager=True, callback=show,
                            help="Print the version and exit.")

    def _write_example(self, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(_Explained, click.Command):
    """A click command that takes its options from config classes.

    The function is called with its own click parameters and with `given`, the Layer of the command line. If
    it has a parameter `dry_run`, it gets a DryRun there, or None; a command without one only reads and prints.
    An option of many values takes all words up to the next option (`--data-path 0.3 a 0.7 b`), as in the
    original.

    Args:
        configs: the config classes, in the order of their options in the help text; DryRun is the last if it
            is not among them.
        example: command line shown first in the help text.
        subcommands: commands that the first word selects instead of this one.
        starts: without any arguments, print how to start instead of an error.
    """

    def __init__(self, *args: Any, configs: Sequence[type] = (), example: str | None = None,
                 distribution: str | None = None, subcommands: Mapping[str, Command] | None = None,
                 starts: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example, self.distribution, self.starts = example, distribution, starts
        self.subcommands = dict(subcommands or {})
        classes = configs if DryRun in configs else (*configs, DryRun)
        self.fields = list({item.name: item for cls in classes for item in fields_of(cls)}.values())
        self.headings = {item.name: item.heading for item in self.fields}
        self.plans = self.callback is not None and "dry_run" in inspect.signature(self.callback).parameters
        for item in self.fields:
            parameter = ConfigOption(item)
            if not self.plans and item.name in ("dry_run", "devices"):
                parameter.hidden = True  # accepted, and without effect: the command only reads
            self.params.append(parameter)
        if distribution is not None:
            self.params.append(self._version_option())
        self._many = {name for item in self.fields if item.many
                      for name in ("--" + item.name, item.flag, *item.aliases)}

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None,
                     **extra: Any) -> click.Context:
        chosen = self.subcommands.get(args[0]) if args else None
        if chosen is not None:
            return chosen.make_context(f"{self.name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and self.starts:
            print(self._how_to_start(ctx), file=sys.stderr)
            sys.exit(USER_MISTAKE)
        spread: list[str] = []
        current = None
        for position, arg in enumerate(args):
            if arg.startswith("--") or (arg.startswith("-") and not _NUMBER.match(arg)):
                current = arg if arg in self._many else None
                spread.append(arg)
            elif current and spread[-1] != current:
                spread += [current, arg]
            else:
                spread.append(arg)
            if arg == "--":
                spread += args[position + 1:]
                break
        return super().parse_args(ctx, spread)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.command is not self:  # a subcommand
            return ctx.command.invoke(ctx)
        given: dict[str, Any] = {}
        for item in self.fields:
            value = ctx.params.pop(item.name)
            if value is not None and value != ():
                given[item.name] = value
        own: dict[str, Any] = {name: given.pop(name) for name in ("dry_run", "devices") if name in given}
        asked = resolve([DryRun], Layer("command line", own))[DryRun]
        if self.plans:
            ctx.params["dry_run"] = asked if asked.dry_run else None
        if given or len(self.fields) > len(fields_of(DryRun)):
            ctx.params["given"] = Layer("command line", given)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example, the subcommands, and the options in groups."""
        self._write_example(formatter)
        if self.subcommands:
            with formatter.section("Subcommands"):
                formatter.write_dl([(name, each.get_short_help_str(200))
                                    for name, each in self.subcommands.items()])
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(self.headings.get(param.name or "", GENERAL), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def _how_to_start(self, ctx: click.Context) -> str:
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self._write_example(formatter)
        return f"{formatter.getvalue().rstrip()}\n\n{ctx.command_path} --help lists all options."


class Group(_Explained, click.Group):
    """A click group with `--version` and an example."""

    def __init__(self, *args: Any, example: str | None = None, distribution: str | None = None,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example, self.distribution = example, distribution
        if distribution is not None:
            self.params.append(self._version_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._write_example(formatter)
        super().format_options(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(200)) for name, each in commands.items() if each])


def distribution_of(module: str) -> str | None:
    """Return the distribution of a module of ours, e.g. `modellink-core` for `modellink.core.cli`."""
    parts = module.split(".")
    return f"modellink-{parts[1].replace('_', '-')}" if parts[0] == "modellink" and len(parts) > 1 else None


def command(*configs: type, name: str | None = None, help: str | None = None, example: str | None = None,
            subcommands: Mapping[str, Command] | None = None,
            starts: bool = False) -> Callable[[Callable[..., Any]], Command]:
    """Decorator: make a function a console command with the options of these config classes (see `Command`)."""
    def wrap(function: Callable[..., Any]) -> Command:
        made = click.command(name=name, cls=Command, configs=configs, help=help or function.__doc__,
                             example=example, distribution=distribution_of(function.__module__),
                             subcommands=subcommands, starts=starts, context_settings=SETTINGS)
        return made(function)
    return wrap


def group(*, cls: type[Group] = Group, example: str | None = None,
          **settings: Any) -> Callable[[Callable[..., Any]], Group]:
    """Decorator: make a function a group of console commands (see `Group`)."""
    def wrap(function: Callable[..., Any]) -> Group:
        made = click.group(cls=cls, example=example, distribution=distribution_of(function.__module__),
                           context_settings=SETTINGS, **settings)
        return made(function)
    return wrap
