"""`--help`, an invalid choice and an unknown option of every command are answered without importing torch.

Times are measured by `benchmarks/start.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HELP = ["--help"]
UNKNOWN = ["--no-such-option", "1"]
SUBCOMMANDS: dict[str, dict[str, list[str]]] = {  # an option with an invalid choice, for each subcommand that has a choice
    "modellink-doctor": {"": []},
    "modellink-convert": {"": ["a", "b", "--to", "nonsense"], "inspect": [], "diff": []},
    "modellink-preprocess": {"": ["--long-samples", "nonsense"], "inspect": [], "merge": []},
    "modellink-train": {"": [], "pretrain": ["--save-format", "nonsense"], "sft": ["--device", "nonsense"],
                        "models": [], "digests": [], "determinism": []},
    "modellink-infer": {"": [], "generate": ["--load", "x", "--device", "nonsense"], "chat": ["--device", "nonsense"],
                        "serve": ["--device", "nonsense"]},
    "modellink-eval": {"": [], "run": ["--device", "nonsense"], "list": [], "report": []},
}
RUN = """
import contextlib, importlib.metadata, io, json, sys
command, *calls = json.loads(sys.argv[1])
(entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
for args in calls:
    sys.argv = [command, *args]
    output, errors, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            entry.load()()
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, output.getvalue(), errors.getvalue(), "torch" in sys.modules]))
"""


def call(command: str, *calls: list[str]) -> list[tuple[int, str, str, bool]]:
    """Run a command several times in one process; return status, output, errors and whether torch is imported by then."""
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps([command, *calls])], capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_and_argument_errors_do_not_import_torch(command: str) -> None:
    names = [[name] if name else [] for name in SUBCOMMANDS[command]]
    for name, (status, output, errors, torch) in zip(names, call(command, *(name + HELP for name in names)), strict=True):
        assert (status, torch) == (0, False) and "Usage:" in output, (name, errors)
    for name, (status, _, errors, torch) in zip(names, call(command, *(name + UNKNOWN for name in names)), strict=True):
        assert (status, torch) == (2, False) and errors.startswith("error: "), (name, errors)
    choices = [[*name, *wrong] for name, wrong in zip(names, SUBCOMMANDS[command].values(), strict=True) if wrong]
    for choice, (status, _, errors, torch) in zip(choices, call(command, *choices), strict=True):
        assert (status, torch) == (2, False), (choice, errors)
        assert errors.startswith(f"error: {choice[-2]} is 'nonsense', it must be one of "), errors
