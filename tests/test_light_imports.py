# SPDX-License-Identifier: Apache-2.0
"""`--help`, an invalid choice and an unknown option of every command are answered without importing torch.

Times are measured by `benchmarks/start.py`.
"""

from __future__ import annotations

import pytest
from console import call

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


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_and_argument_errors_do_not_import_torch(command: str) -> None:
    names = [[command, name] if name else [command] for name in SUBCOMMANDS[command]]
    for name, (status, output, errors, torch) in zip(names, call(*(name + HELP for name in names)), strict=True):
        assert (status, torch) == (0, False) and "Usage:" in output, (name, errors)
    for name, (status, _, errors, torch) in zip(names, call(*(name + UNKNOWN for name in names)), strict=True):
        assert (status, torch) == (2, False) and errors.startswith("error: "), (name, errors)
    choices = [[*name, *wrong] for name, wrong in zip(names, SUBCOMMANDS[command].values(), strict=True) if wrong]
    for choice, (status, _, errors, torch) in zip(choices, call(*choices), strict=True):
        assert (status, torch) == (2, False), (choice, errors)
        assert errors.startswith(f"error: {choice[-2]} is 'nonsense', it must be one of "), errors
