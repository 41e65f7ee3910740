# SPDX-License-Identifier: Apache-2.0
"""The command: its output, its exit statuses, and the files left when it is killed."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from modellink.data_prep import PreprocessOptions, preprocess

SMALL = ("--piece-size", "0.05")


@pytest.fixture
def options(corpus, byte_folder):
    return ["--input", corpus, "--tokenizer-name-or-path", byte_folder, "--append-eod", *SMALL]


@pytest.fixture(scope="session")
def expected(corpus, byte_folder, tmp_path_factory, snapshot):
    """The files of an undisturbed run of two columns."""
    folder = tmp_path_factory.mktemp("undisturbed")
    preprocess(PreprocessOptions(input=(str(corpus),), tokenizer_name_or_path=byte_folder, append_eod=True,
                                 output_prefix=folder / "set", json_keys=("text", "title")), show=False)
    return snapshot(folder)


def test_make_and_inspect(command, options, byte_folder, tmp_path):
    made = command(*options, "--output-prefix", "out/set", "--summary", "summary.json")
    assert made.returncode == 0 and "documents" in made.stdout, made.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["documents"] == {"text": 250} and f"{summary['tokens']['text']:,}" in made.stdout
    seen = command("inspect", "out/set_text_document", "--tokenizer-name-or-path", byte_folder, "--summary", "seen.json")
    found = json.loads((tmp_path / "seen.json").read_text())
    assert seen.returncode == 0 and found["tokens"] == summary["tokens"]["text"] and found["dtype"] == "uint16"
    assert found["lengths"]["shortest"] <= found["lengths"]["median"] <= found["lengths"]["longest"]
    assert len(found["samples"]) == 3 and "document 0" in seen.stdout
    ids_only = command("inspect", "out/set_text_document.idx")
    assert ids_only.returncode == 0 and "document 249" in ids_only.stdout


def test_merge_as_a_word_and_as_the_originals_flag(command, tmp_path, write_lines, byte_folder, snapshot):
    for name in ("0", "1", "both"):
        texts = {"0": ["a", "b"], "1": ["c"], "both": ["a", "b", "c"]}[name]
        path = write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        folder = "whole" if name == "both" else "parts"
        command("--input", path, "--tokenizer-name-or-path", byte_folder, "--output-prefix", f"{folder}/{name}")
    keys = ("--input", "parts", "--merge-group-keys", "text_document")
    assert command("merge", *keys, "--output-prefix", "new/both").returncode == 0
    assert command(*keys, "--output-prefix", "old/both", "--seed", "5").returncode == 0
    assert snapshot(tmp_path / "new") == snapshot(tmp_path / "old") == snapshot(tmp_path / "whole")
    again = command("merge", *keys, "--output-prefix", "new/both")
    assert again.returncode == 2 and "the output already exists" in again.stderr
    nothing = command("merge", "--input", "parts", "--merge-group-keys", "labels", "--output-prefix", "new/x")
    assert nothing.returncode == 2 and "no file name contains 'labels'" in nothing.stderr


@pytest.mark.parametrize(("args", "message"), [
    (["--input", "absent"], "does not exist"), (["--nonsense"], "unknown option"), (["--workers", "0"], "at least 1"),
    (["--tokenizer-type", "GPT2BPETokenizer"], "must be one of|is not"), (["--split-sentences"], "is not supported"),
    (["--config", "bad.yaml"], "unknown key 'workres'")])
def test_mistakes_are_told_in_one_message(command, options, tmp_path, args, message):
    (tmp_path / "bad.yaml").write_text("workres: 3\n")
    result = command(*options, "--output-prefix", "out/set", *args)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    assert any(part in result.stderr for part in message.split("|")), result.stderr


def test_what_must_be_given_is_named(command):
    result = command("--input", "x")
    assert result.returncode == 2 and "--tokenizer-name-or-path, --output-prefix are required" in result.stderr


def test_flags_of_the_original_that_mean_nothing_are_explained(command, options):
    result = command("--dataset-impl", "mmap", *options, "--log-interval=5", "--n-subs", "4", "--output-prefix", "out/set")
    assert result.returncode == 0 and result.stderr.count("is ignored") == 3


def test_options_from_a_file(command, options, tmp_path):
    (tmp_path / "run.yaml").write_text("output_prefix: from_file/set\njson_keys: [title]\n")
    assert command(*options, "--config", "run.yaml").returncode == 0
    assert (tmp_path / "from_file" / "set_title_document.idx").exists()


POINTS = ["after-write", "before-index", "piece-written", "piece-noted", "before-merge", "output-written", "merged"]


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_continues_and_ends_with_the_same_bytes(command, options, expected, tmp_path, snapshot, point):
    arguments = (*options, "--output-prefix", "out/set", "--json-keys", "text", "title", "--summary", "summary.json")
    killed = command(*arguments, MODELLINK_KILL_AT=point)
    assert killed.returncode == -signal.SIGKILL
    if point in POINTS[:5]:
        assert not list((tmp_path / "out").glob("*.idx")), "an output before it is complete"
    assert command(*arguments).returncode == 0
    assert snapshot(tmp_path / "out") == expected
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["pieces_found_done"] > 0) == (point in POINTS[3:])


@pytest.mark.stress  # in the default run, test_kills.py kills shares at random moments
def test_killed_at_random_moments(command, options, expected, tmp_path, snapshot):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    arguments = [*options, "--output-prefix", "out/set", "--json-keys", "text", "title", "--workers", "2"]
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-c", "from modellink.data_prep.cli import main; main()",
                                    *map(str, arguments)], cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
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


def test_a_dying_worker_is_reported_and_its_work_continued(command, options, expected, tmp_path, snapshot):
    arguments = (*options, "--output-prefix", "out/set", "--json-keys", "text", "title", "--workers", "2")
    broken = command(*arguments, MODELLINK_KILL_AT="piece-written")
    assert broken.returncode == 1 and "a worker process died" in broken.stderr
    assert command(*arguments).returncode == 0
    assert snapshot(tmp_path / "out") == expected


def test_a_half_written_part_is_not_trusted(command, options, expected, tmp_path, snapshot):
    arguments = (*options, "--output-prefix", "out/set", "--json-keys", "text", "title")
    command(*arguments, MODELLINK_KILL_AT="before-merge")
    part = sorted((tmp_path / "out" / "set.parts").glob("*_text.bin"))[2]
    part.write_bytes(part.read_bytes()[:-2])
    assert command(*arguments).returncode == 0
    assert snapshot(tmp_path / "out") == expected


def test_rows_left_out_by_a_killed_run_still_fail_when_they_must(command, tmp_path, write_lines, byte_folder):
    path = write_lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": 1}])
    arguments = ("--input", path, "--tokenizer-name-or-path", byte_folder, "--output-prefix", "out/set")
    assert command(*arguments, "--on-bad-row", "skip", MODELLINK_KILL_AT="before-merge").returncode == -signal.SIGKILL
    strict = command(*arguments)
    assert strict.returncode == 2 and "line 2" in strict.stderr


def test_two_runs_do_not_write_one_output(command, options, tmp_path):
    parts = tmp_path / "out" / "set.parts"
    parts.mkdir(parents=True)
    with (parts / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = command(*options, "--output-prefix", "out/set")
    assert result.returncode == 2 and "another run is writing" in result.stderr and parts.exists()


def test_workers_end_with_their_parent(options, tmp_path):
    """A parent that was killed leaves no process behind."""
    process = subprocess.Popen([sys.executable, "-c", "from modellink.data_prep.cli import main; main()", *map(str, options),
                                "--output-prefix", "out/set", "--workers", "2"], cwd=tmp_path, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/set.parts/*.idx")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived its parent")
