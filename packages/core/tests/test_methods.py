"""A training method of another package trains by its own loss, data and metric, with no file of this package edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).with_name("plugin")
OPTIONS = {"seq-length": 24, "micro-batch-size": 2, "global-batch-size": 4, "lr": 5e-3, "eval-iters": 0, "device": "cpu",
           "log-interval": 1, "make-vocab-size-divisible-by": 8, "lr-decay-style": "constant", "weight-decay": 0.0}


@pytest.fixture
def train(tiny, tmp_path):
    """`train(method, *words)`: run the command; its output and the entries of metrics.jsonl."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[(7 * row + 3 * place) % 131 for place in range(25)] for row in range(6)]))

    def run(method: str, *words: object) -> tuple[str, list[dict]]:
        given = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        arguments = [method, "--sequences", rows, "--load", tiny, "--save", tmp_path / "save", *given, *words]
        done = subprocess.run([sys.executable, "-m", "modellink.core.cli", *map(str, arguments)], capture_output=True,
                              text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(PLUGIN)})
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
        return done.stdout, [json.loads(line) for line in lines]
    return run


def test_its_loss_data_and_metric(train, tmp_path):
    said, steps = train("focal", "--gamma", 2, "--train-iters", 3)
    assert said.count("| mean-weight: ") == 3 and "gamma ...." in said
    assert [step["iteration"] for step in steps] == [1, 2, 3]
    weights = [step["metrics"]["mean-weight"] for step in steps]
    assert 0.9 < weights[0] < 1 and steps[-1]["loss"] < steps[0]["loss"]
    progress = json.loads((tmp_path / "save" / "iter_0000003" / "training.json").read_text())
    assert progress["method"] == "focal"
    said, resumed = train("focal", "--gamma", 2, "--train-iters", 4, "--auto-resume")
    assert "resuming from" in said and resumed[:3] == steps and len(resumed) == 4


def test_gamma_zero_is_cross_entropy_from_python_too(train, tiny, tmp_path):
    """The same run through `fit` with a method class, by a script; a callback sees every step."""
    _, steps = train("focal", "--gamma", 0, "--train-iters", 2)
    settings = {name.replace("-", "_"): value for name, value in OPTIONS.items()} | {
        "sequences": str(tmp_path / "rows.json"), "load": str(tiny), "gamma": 0, "train_iters": 2}
    script = f"""
import focal
from modellink.core import Callback, fit
class Seen(Callback):
    losses = []
    def on_step(self, training, step): self.losses.append(step.loss)
    def on_end(self, training): assert training.iteration == 2
steps = fit(focal.Focal, {settings!r}, [Seen()])
assert [step.loss for step in steps] == Seen.losses == {[step["loss"] for step in steps]!r}, Seen.losses
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(PLUGIN)})
    assert done.returncode == 0, done.stderr


def test_a_reference_model_over_pipeline_stages(train, tmp_path):
    """At the first step the model is its reference; then it moves away. A resumed run must be given the reference."""
    _, steps = train("anchored", "--train-iters", 2, "--pipeline-model-parallel-size", 2)
    assert steps[0]["metrics"]["distance"] == 0 < steps[1]["metrics"]["distance"]
    with pytest.raises(AssertionError, match="--ref-load"):
        train("anchored", "--train-iters", 3, "--auto-resume")
    _, alone = train("anchored", "--train-iters", 2, "--save", tmp_path / "save" / "alone")
    assert alone == steps  # the file of the first run
    other = [json.loads(line) for line in (tmp_path / "save" / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert [step["metrics"]["distance"] for step in other] == pytest.approx(
        [step["metrics"]["distance"] for step in steps], rel=1e-4)


def test_help_lists_it_and_a_misspelt_name_is_answered():
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "modellink.core.cli", *words], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"PYTHONPATH": str(PLUGIN)})
    assert "Pretrain with focal loss." in run("--help").stdout
    assert "--gamma" in run("focal", "--help").stdout
    wrong = run("focl", "--lr", "1")
    assert wrong.returncode == 2 and "focal" in wrong.stderr
