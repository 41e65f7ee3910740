# SPDX-License-Identifier: Apache-2.0
"""Packed instruction sets and shares, killed at named points and at random moments, end with the same bytes."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from modellink.data_prep import PreprocessOptions, preprocess

POINTS = ["after-write", "before-index", "piece-written", "piece-noted", "before-merge", "output-written", "merged"]
ROWS = [{"instruction": f"number {number}", "output": "word " * (number * 7 % 40 + 1)} for number in range(600)]


@pytest.fixture(scope="session")
def rows(tmp_path_factory, write_lines):
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture
def arguments(rows, byte_folder):
    return ["--input", rows, "--tokenizer-name-or-path", byte_folder, "--handler-name", "AlpacaStyleInstructionHandler",
            "--prompt-type", "qwen", "--seq-length", "200", "--pack", "--piece-size", "0.01", "--output-prefix", "out/set"]


@pytest.fixture(scope="session")
def expected(rows, byte_folder, tmp_path_factory, snapshot):
    folder = tmp_path_factory.mktemp("undisturbed")
    preprocess(PreprocessOptions(input=(str(rows),), tokenizer_name_or_path=byte_folder, output_prefix=folder / "set",
                                 handler_name="AlpacaStyleInstructionHandler", prompt_type="qwen", seq_length=200, pack=True),
               show=False)
    return snapshot(folder)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_packing_continues(command, arguments, expected, tmp_path, snapshot, point):
    killed = command(*arguments, MODELLINK_KILL_AT=point)
    assert killed.returncode == -signal.SIGKILL
    done = command(*arguments)
    assert done.returncode == 0 and "filled" in done.stdout, done.stderr
    assert snapshot(tmp_path / "out") == expected


def test_parts_without_the_outputs_made_of_them_are_not_trusted(command, arguments, expected, tmp_path, snapshot):
    """Killed while removing the parts; then an output was deleted."""
    assert command(*arguments, MODELLINK_KILL_AT="merged").returncode == -signal.SIGKILL
    min((tmp_path / "out" / "set.parts").glob("*.bin")).unlink()
    min((tmp_path / "out").glob("*.idx")).unlink()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "out") == expected


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.stress)])
def test_shares_killed_at_random_moments(command, arguments, expected, tmp_path, snapshot, times):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(times):
        extra = rng.choice([["--piece", "0/2"], ["--piece", "1/2", "--workers", "2"], ["--workers", "2"]])
        process = subprocess.Popen([sys.executable, "-c", "from modellink.data_prep.cli import main; main()",
                                    *map(str, [*arguments, *extra])], cwd=tmp_path, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 2.5))
        process.kill()
        process.wait()
        if not (tmp_path / "out" / "set.parts").exists() and (tmp_path / "out").exists():  # it was faster
            assert snapshot(tmp_path / "out") == expected, seed
            shutil.rmtree(tmp_path / "out")
    if not (tmp_path / "out").exists() or (tmp_path / "out" / "set.parts").exists():
        result = command(*arguments)
        assert result.returncode == 0, (seed, result.stderr)
    assert snapshot(tmp_path / "out") == expected, seed
