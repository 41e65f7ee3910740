# SPDX-License-Identifier: Apache-2.0
"""The command: its output, and that mistakes end with one message, status 2 and no files."""

import importlib.util
import subprocess
import sys

import pytest

from modellink.eval import evaluate

HAS_INFER = importlib.util.find_spec("modellink.infer") is not None


def test_list_shows_the_benchmarks(command):
    done = command("list")
    assert done.returncode == 0
    assert "mmlu" in done.stdout and "boolq" in done.stdout and "lm-eval" in done.stdout


def test_report_prints_a_run_again(command, data, backend, tmp_path):
    found = evaluate(["mmlu", "boolq"], data, backend, tmp_path / "out")
    done = command("report", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    micro = found["tasks"]["mmlu"]["micro"]
    assert f"mmlu acc = {micro['correct']}/23={micro['correct'] / 23}" in done.stdout.splitlines()
    assert "old_cities" in done.stdout and "macro: mean of subjects" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "micro: all questions" in line]
    assert len(rows) == 1 and f"{100 * micro['accuracy']:.2f} %" in rows[0] and f"{100 * micro['stderr']:.2f}" in rows[0]


def test_report_of_an_empty_folder(command, tmp_path):
    done = command("report", tmp_path)
    assert done.returncode == 2 and "no results were found" in done.stderr


GOOD = {"--task": ["mmlu"], "--task-data-path": ["data"], "--load": ["model"], "--output": ["out"]}


@pytest.mark.parametrize(("change", "message"), [
    ({"--task": ["mmlo"]}, "unknown task 'mmlo'"),
    ({"--task": ["mmlu", "mmlu"]}, "a task is given twice"),
    ({"--task-data-path": ["nowhere"]}, "the folder does not exist"),
    ({"--task-data-path": ["data/boolq"]}, "no data of mmlu was found"),
    ({"--prompt-style": ["chat"]}, "--prompt-style is 'chat', it must be one of original, lm-eval"),
    ({"--evaluation-batch-size": ["0"]}, "--evaluation-batch-size is 0"),
    ({"--max-eval-samples": ["0"]}, "--max-eval-samples is 0"),
    ({"--tp": ["x"]}, "--tensor-model-parallel-size is 'x'"),
    ({"--load": None}, "exactly one model is required"),
    ({"--endpoint": ["http://x/v1"]}, "exactly one model"),
    ({"--prompt-type": ["qwen"], "--no-chat-template": ["--seed", "1"]}, "contradict each other"),
    ({"--prompt-type": ["qwen"], "--eval-language": ["fr"]}, "--eval-language is 'fr', it must be one of"),
    ({"--num-samples": ["5"]}, "5 times the same text"),
    ({"--task": ["gsm8k"], "--max-new-tokens": ["0"]}, "--max-new-tokens is 0"),
    ({"--output": None}, "--output is required"),
    ({"--task-data-paht": ["data"]}, "unknown option"),
])
def test_a_mistake(command, data, tmp_path, snapshot, change, message):
    before = snapshot(tmp_path)
    words = [word for name, values in (GOOD | change).items() if values for word in (name, *values)]
    done = command("run", *words)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(HAS_INFER, reason="modellink-infer is installed")
def test_without_infer_a_local_model_is_refused_with_the_command_that_helps(command, data, tmp_path, snapshot):
    before = snapshot(tmp_path)
    done = command("run", *(word for name, values in GOOD.items() for word in (name, *values)))
    assert done.returncode == 2 and 'pip install "modellink-eval[local]"' in done.stderr
    assert snapshot(tmp_path) == before


def test_options_may_come_from_a_file(command, tmp_path):
    (tmp_path / "run.yaml").write_text("task: [mmlu]\ntask-data-path: [nowhere]\nload: model\noutput: out\n")
    done = command("run", "--config", "run.yaml")
    assert done.returncode == 2 and "folder does not exist" in done.stderr and "nowhere" in done.stderr


def test_no_import_needs_torch():
    code = "import sys, modellink.eval.cli, modellink.eval.backends.local; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
