# SPDX-License-Identifier: Apache-2.0
"""Small sets in the original layouts, a small model, and helpers that run processes."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
CAPITALS = [("France", "Paris"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Peru", "Lima"), ("Cuba", "Havana"),
            ("Kenya", "Nairobi"), ("Iran", "Tehran"), ("Chile", "Santiago"), ("Nepal", "Kathmandu"), ("Austria", "Vienna")]
Rows = list[tuple[str, ...]]


def capital_rows(first: int, count: int) -> Rows:
    """Questions with the right answer in turn at A, B, C, D; lengths differ."""
    rows = []
    for number in range(first, first + count):
        country, city = CAPITALS[number % len(CAPITALS)]
        others = [other for _, other in CAPITALS if other != city]
        choices = others[number % 5:number % 5 + 3]
        choices.insert(number % 4, city)
        question = f"What is the capital of {country}?" + f" This is question {number}." * (number % 3)
        rows.append((question, *choices, "ABCD"[number % 4]))
    return rows


@pytest.fixture(scope="session")
def write_csv() -> Callable[[Path, Rows], Path]:
    """Write a file in the format of the MMLU set, and create its folder."""
    def write_csv(path: Path, rows: Rows) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        return path
    return write_csv


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[Any]], Path]:
    """Write objects as lines, and create the folder."""
    def write_jsonl(path: Path, rows: list[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    return write_jsonl


@pytest.fixture
def data(tmp_path: Path, write_csv, write_jsonl) -> Path:
    """An MMLU-shaped set (subjects of 14 and 9 questions, 6 rows of examples each) and a BoolQ-shaped one (10 questions)."""
    folder = tmp_path / "data"
    for subject, first, count in (("old_cities", 0, 14), ("rivers", 3, 9)):
        write_csv(folder / "mmlu" / "test" / f"{subject}_test.csv", capital_rows(first, count))
        write_csv(folder / "mmlu" / "dev" / f"{subject}_dev.csv", capital_rows(first + 20, 6))
    write_jsonl(folder / "boolq" / "dev.jsonl", [
        {"question": f"is {city} the capital of {country}", "title": country, "answer": number % 3 > 0,
         "passage": f"{country} is a country. " * (number % 4 + 1) + f"{city} is {'' if number % 3 else 'not '}its capital."}
        for number, (country, city) in enumerate(CAPITALS)])
    write_jsonl(folder / "gsm8k" / "test.jsonl", [
        {"question": f"Ann has {number} apples" + " and eats none" * (number % 4) + ". How many are left?",
         "answer": f"She keeps them.\n#### {number % 5}"} for number in range(12)])
    return folder


@pytest.fixture(scope="session")
def ngram() -> ModuleType:
    """The module `ngram.py`."""
    spec = importlib.util.spec_from_file_location("ngram", HERE / "ngram.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Path:
    return HERE / "ngram.py"


@pytest.fixture
def backend(ngram: ModuleType) -> Any:
    return ngram.NgramBackend()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Run:
    """Run the command in a new process; keywords are environment variables."""
    def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("modellink-eval")
        start = [str(program)] if program.exists() else [sys.executable, "-m", "modellink.eval.cli"]
        return subprocess.run([*start, *map(str, args)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=os.environ | {"COLUMNS": "120"} | environment)
    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Return the content of the files of a folder by name."""
    def snapshot(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return snapshot


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the shared test data: MODELLINK_TEST_DATA, or ../shared/data next to the checkout."""
    checkout = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("MODELLINK_TEST_DATA") or checkout.parent / "shared" / "data")
    if not (folder / "mmlu").is_dir() or not (folder / "boolq").is_dir():
        pytest.skip(f"no MMLU and BoolQ in {folder}; set MODELLINK_TEST_DATA")
    return folder
