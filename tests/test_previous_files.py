# SPDX-License-Identifier: Apache-2.0
"""Files that the previous commit wrote are read, and what it left unfinished resumes, to the same numbers and bytes.

`previous/files.tar.xz` holds the files, `previous/record.json` the commands with which that commit finished them and what came
out; `previous/make.py` made both.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent / "previous"
RECORD: dict[str, Any] = json.loads((HERE / "record.json").read_text())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(HERE / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def files(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the current folder: the recorded commands have relative paths."""
    folder = tmp_path / "files"
    shutil.copytree(unpacked, folder)
    monkeypatch.chdir(folder)
    return folder


Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a console command in this process and return its output."""
    def call(*command: str) -> str:
        (entry,) = entry_points(group="console_scripts", name=command[0])
        monkeypatch.setattr(sys, "argv", list(command))
        with pytest.raises(SystemExit) as ended:
            entry.load()()
        output = capsys.readouterr()
        assert ended.value.code == 0, output.err
        return output.out
    return call


def resume(name: str) -> list[list[float]]:
    """Run a recorded training command in a process of its own; return iteration, loss and gradient norm of each step."""
    program, *args = RECORD["resumed"][name]["command"]
    done = subprocess.run([str(Path(sys.executable).with_name(program)), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    return [[line["iteration"], line["loss"], line["grad_norm"]] for line in lines]


@pytest.mark.parametrize("name", RECORD["resumed"])
def test_a_stopped_run_resumes_with_the_same_losses(files: Path, name: str) -> None:
    recorded = RECORD["resumed"][name]["steps"]
    assert [step[0] for step in recorded] == [1, 2, 3, 4] and recorded[3][1] != recorded[1][1]
    before = (files / name / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 2  # steps 3 and 4 are computed here
    steps = resume(name)
    assert [step[0] for step in steps] == [1, 2, 3, 4]
    for step, expected in zip(steps, recorded, strict=True):
        assert step[1] == pytest.approx(expected[1], rel=1e-6) and step[2] == pytest.approx(expected[2], rel=1e-5)


@pytest.mark.parametrize("form", ["megatron-core", "megatron-legacy", "torch_dist"])
def test_a_converted_checkpoint_holds_the_weights_of_the_hugging_face_folder(files: Path, call: Call, form: str) -> None:
    assert "14 tensors" in call("modellink-convert", "diff", "hf", form)  # status 1 if one differs


def test_checkpoints_generate_the_same_tokens(files: Path, call: Call) -> None:
    call(*RECORD["merge"])
    for text in RECORD["texts"].values():
        found, expected = json.loads(call(*text["command"])), text["said"]
        assert found["token_ids"] == expected["token_ids"] and len(found["token_ids"]) > 1
        assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    assert len({str(text["said"]["logprobs"]) for text in RECORD["texts"].values()}) >= 5  # what was trained differs


def test_a_stopped_preprocessing_run_ends_with_the_same_bytes(files: Path, call: Call) -> None:
    recorded = RECORD["preprocess"]
    place_inputs(files / "stopped/plain.parts/journal.jsonl", files / "plain.jsonl")
    call(*recorded["command"], "--summary", "summary.json")
    summary = json.loads((files / "summary.json").read_text())
    assert summary["pieces_found_done"] == 1  # it was killed after it had noted the first
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (files / "stopped").iterdir()}
    assert found == recorded["files"]


def place_inputs(journal: Path, *inputs: Path) -> None:
    """Make a journal's input the files at `inputs`: it knows them by a digest of path, size and time, as that commit did."""
    digest = hashlib.sha256()
    for path in inputs:
        status = path.stat()
        digest.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns]).encode())
    header, *rest = journal.read_text().splitlines()
    entry = json.loads(header)
    assert "input" in entry["made_from"]
    entry["made_from"]["input"] = digest.hexdigest()
    journal.write_text("\n".join([json.dumps(entry), *rest, ""]))


@pytest.mark.parametrize("again", [
    pytest.param(["data/chats", "--seq-length", "16"], id="chats"),
    pytest.param(["data/packed", "--seq-length", "16", "--pack"], id="packed")])
def test_instruction_data_is_made_of_the_same_bytes(files: Path, call: Call, again: list[str]) -> None:
    prefix, *options = again
    before = {path.name: path.read_bytes() for path in files.glob(f"{prefix}*")}
    call("modellink-preprocess", "--tokenizer-name-or-path", "hf", "--tokenizer-backend", "tokenizers", "--input", "chats.jsonl",
         "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "chatml", "--output-prefix", prefix, "--overwrite",
         *options)
    assert {path.name: path.read_bytes() for path in files.glob(f"{prefix}*")} == before and len(before) == 6


def test_a_stopped_evaluation_resumes_its_journal(files: Path, call: Call) -> None:
    recorded = RECORD["eval"]
    call(*recorded["command"])
    results = json.loads((files / "scores/results.json").read_text())
    assert results["run"]["boolq"]["found answered"] == recorded["run"] > 0
    assert results["tasks"] == recorded["tasks"]
