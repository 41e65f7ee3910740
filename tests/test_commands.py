# SPDX-License-Identifier: Apache-2.0
"""Every command: grouped help with an example, `--version`, how to start, and a dry run that writes nothing."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from console import call

GROUPS = ["modellink-train", "modellink-train models", "modellink-infer", "modellink-eval"]
COMMANDS = [
    "modellink-convert", "modellink-convert inspect", "modellink-convert diff", "modellink-preprocess",
    "modellink-preprocess inspect", "modellink-preprocess merge", "modellink-train pretrain", "modellink-train sft",
    "modellink-train models list", "modellink-train models show", "modellink-train digests", "modellink-train determinism",
    "modellink-infer generate", "modellink-infer chat", "modellink-infer serve", "modellink-eval run", "modellink-eval list",
    "modellink-eval report", "modellink-doctor"]
TRAIN = ["--data-path", "data/text_text_document", "--seq-length", "32", "--train-iters", "3", "--lr", "1e-4", "--device", "cpu"]
SCORE = ["--task", "boolq", "--task-data-path", "boolq", "--output", "scores", "--device", "cpu"]
PLANNERS = {"modellink-convert", "modellink-preprocess", "modellink-preprocess merge", "modellink-preprocess inspect",
            "modellink-train pretrain", "modellink-train sft", "modellink-train determinism", "modellink-infer generate",
            "modellink-infer chat", "modellink-infer serve", "modellink-eval run"}
"""Commands that write files or start processes, so that --dry-run has something to leave out."""


@pytest.fixture(scope="module", params=[80, 120])
def helps(request) -> dict[str, tuple[int, str]]:
    """Width and help text of every command."""
    words = [[*name.split(), "--help"] for name in (*COMMANDS, *GROUPS)]
    found = call(*words, environment={"COLUMNS": str(request.param)})
    assert all(status == 0 for status, *_ in found)
    return {name: (request.param, output) for name, (_, output, *_) in zip((*COMMANDS, *GROUPS), found, strict=True)}


def test_help_begins_with_an_example_and_lists_each_option_once(helps) -> None:
    for name, (width, text) in helps.items():
        sections = re.findall(r"^(\S.*):$", text, re.MULTILINE)
        assert sections[0] == "Example" and "--version" in text, name
        assert max(map(len, text.splitlines())) <= width, name
        # an option is at the beginning of a line, after two spaces; its other spellings are on the same line
        options = re.findall(r"^  (?:-\w, )?(--[\w\[\]-]+)", text.split("Example:")[1], re.MULTILINE)
        assert len(options) == len(set(options)) and not re.search(r"^  --\w+_\w", text, re.MULTILINE), name
        assert ("--dry-run" in options) == (name in PLANNERS), name


def test_groups_of_options(helps) -> None:
    for name, (_, text) in helps.items():
        sections = re.findall(r"^(\S.*):$", text, re.MULTILINE)
        if name in ("modellink-train pretrain", "modellink-train sft"):
            assert sections[1:5] == ["Data", "Instruction data", "Checkpoints", "Model"]
            assert sections[-1].startswith("Model architecture") and "--num-layers" in text.split(sections[-1])[1]
            assert "[required without --load or --model]" in " ".join(text.split())
        if name in ("modellink-convert", "modellink-preprocess"):
            assert {"Subcommands", "Output", "General"} < set(sections) and "--load-dir" not in text
        if name in GROUPS:
            assert sections[-1] == "Commands"


def test_version() -> None:
    for name, (status, output, *_) in zip(COMMANDS, call(*([*name.split(), "--version"] for name in COMMANDS)), strict=True):
        package = {"modellink-doctor": "modellink-kernels", "modellink-convert": "modellink-ckpt-convert",
                   "modellink-preprocess": "modellink-data-prep", "modellink-train": "modellink-core"}.get(
                       name.split()[0], name.split()[0])
        assert status == 0 and output.split() == [name.split()[0], version(package)], output


def test_without_arguments_a_command_shows_how_to_start() -> None:
    names = [name for name in COMMANDS if name not in (
        "modellink-doctor", "modellink-eval list", "modellink-train models list", "modellink-train determinism")]
    for name, (status, output, errors, torch) in zip(names, call(*(name.split() for name in names)), strict=True):
        assert (status, output, torch) == (2, "", False), name
        assert "Example:\n" in errors and errors.rstrip().endswith(f"{name} --help lists all options."), errors


@pytest.fixture(scope="module")
def material(tmp_path_factory, eval_model) -> Path:
    """A folder with text, a preprocessed dataset and benchmark data."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"Document {number}. " * 30}) + "\n" for number in range(40)))
    (folder / "boolq").mkdir()
    (folder / "boolq" / "dev.jsonl").write_text(json.dumps(
        {"question": "is water wet", "passage": "Water is wet.", "title": "Water", "answer": True}) + "\n")
    (status, _, errors, _), = call(["modellink-preprocess", "--input", "text.jsonl", "--output-prefix", "data/text",
                                    "--tokenizer-name-or-path", str(eval_model), "--append-eod"], cwd=folder)
    assert status == 0, errors
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_dry_run_of_each_command_prints_its_plan_and_writes_nothing(material, eval_model) -> None:
    model = str(eval_model)
    train = ["--load", model, *TRAIN, "--save", "run", "--tp", "2"]
    cases = {
        "modellink-convert": ([model, "mcore", "--to", "megatron-core", "--tp", "2"], "TP 2"),
        "modellink-preprocess": (["--input", "text.jsonl", "--output-prefix", "new/text", "--tokenizer-name-or-path", model],
                                 "new/text_text_document.bin, .idx"),
        "modellink-preprocess merge": (["--input", "data", "--output-prefix", "merged/text", "--merge-group-keys",
                                        "text_document"], "merged/text_text_document.bin, .idx"),
        "modellink-preprocess inspect": (["data/text_text_document", "--histogram", "lengths.svg"], "documents"),
        "modellink-train pretrain": ([*train, "--devices", "4"], "2 samples of 32 tokens per iteration"),
        "modellink-train determinism": (["--device", "cpu"], "tensor parallel, dropout"),
        "modellink-infer generate": (["--load", model, "--prompt", "x", "--device", "cpu", "--tp", "2", "--devices", "2"],
                                     "TP 2"),
        "modellink-infer serve": (["--load", model, "--device", "cpu"], "http://127.0.0.1:8000"),
        "modellink-eval run": (["--load", model, *SCORE], "1 questions in 1 subjects"),
        "modellink-doctor": (["--device", "cpu"], "versions")}
    before = contents(material)
    found = call(*([*name.split(), *words, "--dry-run"] for name, (words, _) in cases.items()), cwd=material)
    for (name, (_, shown)), (status, output, errors, _) in zip(cases.items(), found, strict=True):
        assert status == 0 and shown.lower() in output.lower(), (name, output, errors)
        assert name == "modellink-doctor" or output.endswith("dry run: nothing was started or written\n"), name
    assert contents(material) == before


@pytest.mark.parametrize(("words", "what"), [
    ("modellink-train pretrian", "did you mean pretrain?"),
    ("modellink-eval lst", "did you mean list?"),
    ("modellink-train pretrain --train-itres 3", "did you mean --train-iters?"),
    ("modellink-train pretrain --train-iters many", "--train-iters is 'many', it must be a whole number"),
    ("modellink-convert MODEL out --to hf --devices 2", "add --dry-run"),
    ("modellink-convert MODEL out --to megatron-core --tp 5 --dry-run", "tensor parallel size 5"),
    ("modellink-convert MODEL out --to megatron-core --tp 2 --dry-run --devices 3", "--devices is 3"),
    ("modellink-infer generate --load MODEL --prompt x --device cpu --tp 5 --dry-run", "tensor parallel size 5"),
    (f"modellink-train pretrain --load MODEL {' '.join(TRAIN)} --tp 2 --dry-run --devices 3", "3 processes are not a multiple"),
])
def test_bad_input_gets_one_message(words, what, material, eval_model) -> None:
    before = contents(material)
    (status, output, errors, _), = call(words.replace("MODEL", str(eval_model)).split(), cwd=material)
    assert status == 2 and errors.startswith("error: ") and what in errors, errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors and output == ""
    assert contents(material) == before
