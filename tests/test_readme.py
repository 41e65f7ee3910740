# SPDX-License-Identifier: Apache-2.0
"""What the READMEs show can be typed: every option of a `modellink-*` command line exists, every Python block compiles.

A ```console block is read line by line (a backslash continues a line); each `modellink-<x> [subcommand] --option ...` in it is
compared with the --help of that command. Of a ```python block the syntax is checked and the imports are executed. A block right
after a line `<!-- not tested: reason -->` is skipped.
Not covered: running the commands; the quickstart session runs the full chain.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"(?P<before>[^\n]*)\n```(?P<kind>console|python)\n(?P<body>.*?)\n```", re.DOTALL)
COMMANDS = [f"modellink-{name}" for name in ("convert", "preprocess", "train", "infer", "eval", "doctor")]


class Block(NamedTuple):
    where: str
    kind: str
    body: str


def blocks() -> Iterator[Block]:
    for path in (ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("examples/**/*.md"))):
        text = path.read_text("utf-8")
        for match in FENCE.finditer("\n" + text):
            if "<!-- not tested:" not in match["before"]:
                line = text[: match.start()].count("\n") + 2
                yield Block(f"{path.relative_to(ROOT).as_posix()}:{line}", match["kind"], match["body"])


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every line of a console block that calls a command of ours."""
    for block in blocks():
        if block.kind == "console":
            for line in block.body.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0].startswith("modellink-"):
                    yield block.where, words


@functools.cache
def help_of(*command: str) -> str:
    executable = Path(sys.executable).parent / command[0]
    found = str(executable) if executable.exists() else shutil.which(command[0])
    if found is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([found, *command[1:], "--help"], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)} --help\n{done.stderr}"
    return done.stdout + done.stderr


LINES = list(command_lines())


@pytest.mark.parametrize(("where", "words"), LINES, ids=[f"{where}-{words[0]}" for where, words in LINES])
def test_a_command_line_exists(where: str, words: list[str]) -> None:
    assert words[0] in COMMANDS, f"{where}: no package has the command {words[0]}"
    text = help_of(words[0])
    command = [words[0]]
    if len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):  # folders are written with a slash
        command.append(words[1])
        text = help_of(*command)
        assert re.search(rf"^Usage: .*{words[0]} {words[1]}\b", text, re.MULTILINE), f"{where}: {words[0]} has no {words[1]}"
    for word in words[1:]:
        option = word.split("=")[0]
        if re.fullmatch(r"--[a-z][a-z0-9-]*", option):
            assert re.search(rf"{option}(?![a-z0-9-])", text), f"{where}: {' '.join(command)} has no option {option}"


SNIPPETS = [block for block in blocks() if block.kind == "python"]


@pytest.mark.parametrize("block", SNIPPETS, ids=[block.where for block in SNIPPETS])
def test_a_python_block_compiles_and_imports(block: Block) -> None:
    tree = ast.parse(block.body, block.where)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = ast.Module([node], type_ignores=[])
            exec(compile(ast.fix_missing_locations(module), block.where, "exec"), {})


def test_every_command_is_shown() -> None:
    shown = {words[0] for where, words in LINES if where.startswith("README.md:")}
    assert shown == set(COMMANDS), f"README.md shows no example of {sorted(set(COMMANDS) - shown)}"


def test_option_tables_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "docs.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun python tools/docs.py"
