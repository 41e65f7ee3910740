# SPDX-License-Identifier: Apache-2.0
"""Describing a checkpoint, help and argument errors need no torch, whose import takes seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LIGHT = ["adapter", "blocks", "cli", "convert", "families", "family", "format", "formats", "hf_config", "inspect", "iterations",
         "layer", "lora", "lora_targets", "manifest", "megatron.model", "open", "options", "peft", "plan", "rules", "source",
         "spec", "streams", "verify", "verify_model", "weights"]
COMMAND = """
import sys
from modellink.{command} import main
sys.argv[1:] = {arguments!r}
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_all_modules_does_not_import_torch() -> None:
    imports = "\n".join(f"import modellink.ckpt_convert.{name}" for name in LIGHT)
    done = python(f"{imports}\nfrom modellink.ckpt_convert.formats import formats\nformats()\nimport sys\n"
                  "assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("command", "arguments", "status", "text"), [
    ("ckpt_convert.cli", ["--help"], 0, "Usage:"),
    ("ckpt_convert.cli", ["a", "b", "--to", "mcore"], 2, "did you mean megatron-core?"),
    ("ckpt_convert.cli", ["--to", "hf"], 2, "SRC is required"),
    ("ckpt_convert.cli", ["missing", "b", "--to", "hf"], 2, "the checkpoint folder is missing"),
    ("ckpt_convert.cli", ["inspect"], 2, "modellink-convert inspect --help lists all options."),
    ("ckpt_convert.cli", ["inspect", "--json"], 2, "PATH is required"),
    ("kernels.doctor", ["--help"], 0, "Usage:"),
    ("kernels.doctor", ["--device", "gpu"], 2, "did you mean cuda?")])
def test_help_and_errors(command: str, arguments: list[str], status: int, text: str) -> None:
    done = python(COMMAND.format(command=command, arguments=arguments))
    assert done.returncode == status, done.stderr
    assert text in done.stdout + done.stderr and "AssertionError" not in done.stderr


def test_opening_a_checkpoint(make_model: Callable[..., Path]) -> None:
    done = python(f"""
import sys
from modellink.ckpt_convert import open_checkpoint
checkpoint = open_checkpoint({str(make_model("llama"))!r})
assert checkpoint.spec.layer(1).ffn == 36 and checkpoint.main_kind == "float32" and len(checkpoint.shapes) == 27
assert "torch" not in sys.modules
""")
    assert done.returncode == 0, done.stderr
