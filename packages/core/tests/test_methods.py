# SPDX-License-Identifier: Apache-2.0
"""A training method of another package trains by its own loss, data and metric, with no file of this package edited."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modellink.core.cli import _run, main
from modellink.core.train.method import registered

PLUGIN = Path(__file__).with_name("plugin")
OPTIONS = {"seq-length": 24, "micro-batch-size": 2, "global-batch-size": 4, "lr": 5e-3, "eval-iters": 0, "device": "cpu",
           "log-interval": 1, "make-vocab-size-divisible-by": 8, "lr-decay-style": "constant", "weight-decay": 0.0}


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within the context, this process finds the plugin as it finds an installed package."""
    sys.path.insert(0, str(PLUGIN))
    registered.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(PLUGIN))
        registered.cache_clear()


def trained(words: list[str]) -> str:
    """On a rank: what the command does there; its output."""
    sys.argv[1:] = words
    with installed(), contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        _run()
    return said.getvalue()


def fitted(method: str, settings: dict[str, Any]) -> tuple[list[float], list[float], list[int]]:
    """On a rank: `fit` with a method class and a callback; the losses of both, and the last iteration that the callback sees."""
    from importlib import import_module

    from modellink.core import Callback, fit
    seen, ends = list[float](), list[int]()

    class Seen(Callback):
        def on_step(self, training: Any, step: Any) -> None:
            seen.append(step.loss)

        def on_end(self, training: Any) -> None:
            ends.append(training.iteration)
    with installed():
        steps = fit(getattr(import_module("focal"), method), settings, [Seen()])
    return [step.loss for step in steps], seen, ends


@pytest.fixture
def words(tiny, tmp_path):
    """`words(method, *more)`: the command line of a run."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[(7 * row + 3 * place) % 131 for place in range(25)] for row in range(6)]))

    def make(method: str, *more: object) -> list[str]:
        given = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        return [*map(str, [method, "--sequences", rows, "--load", tiny, "--save", tmp_path / "save", *given, *more])]
    return make


@pytest.fixture
def train(pools, words, tmp_path):
    """`train(method, *more)`: what the command does on one rank; its output and the entries of metrics.jsonl."""
    def run(method: str, *more: object) -> tuple[str, list[dict]]:
        (said,) = pools(1)(trained, words=words(method, *more))
        return said, entries(tmp_path / "save")
    return run


def entries(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_its_loss_data_and_metric(train, tmp_path):
    said, steps = train("focal", "--gamma", 2, "--train-iters", 3)
    assert said.count("| mean-weight: ") == 3 and "gamma ...." in (tmp_path / "save/arguments.txt").read_text()
    assert [step["iteration"] for step in steps] == [1, 2, 3]
    weights = [step["metrics"]["mean-weight"] for step in steps]
    assert 0.9 < weights[0] < 1 and steps[-1]["loss"] < steps[0]["loss"]
    progress = json.loads((tmp_path / "save" / "iter_0000003" / "training.json").read_text())
    assert progress["method"] == "focal"
    said, resumed = train("focal", "--gamma", 2, "--train-iters", 4, "--auto-resume")
    assert "resuming from" in said and resumed[:3] == steps and len(resumed) == 4


def test_gamma_zero_is_cross_entropy_from_python_too(pools, train, tiny, tmp_path):
    """The same run through `fit` with a method class; a callback sees every step."""
    _, steps = train("focal", "--gamma", 0, "--train-iters", 2)
    settings = {name.replace("-", "_"): value for name, value in OPTIONS.items()} | {
        "sequences": str(tmp_path / "rows.json"), "load": str(tiny), "gamma": 0, "train_iters": 2}
    losses = [step["loss"] for step in steps]
    assert pools(1)(fitted, method="Focal", settings=settings) == [(losses, losses, [2])]


def test_a_reference_model_over_pipeline_stages(pools, words, tmp_path, monkeypatch, capsys):
    """At the first step the model is its reference; then it moves away, also when resumed with the same command.

    Without the --load of its start a resumed run must be given the reference, and a method that uses none refuses one.

    The run over two stages is the command itself, whose ranks find the plugin too.
    """
    two = words("anchored", "--train-iters", 2, "--pipeline-model-parallel-size", 2)
    done = subprocess.run([sys.executable, "-m", "modellink.core.cli", *two], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(PLUGIN), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    distances = [step["metrics"]["distance"] for step in entries(tmp_path / "save")]
    assert distances[0] == 0 < distances[1]
    with installed():
        status, said = command(monkeypatch, capsys, *words("anchored", "--train-iters", 3, "--load", tmp_path / "save"))
        assert status == 2 and "needs the reference model it started with" in said
        status, said = command(monkeypatch, capsys, *words("focal", "--train-iters", 3, "--ref-load", tmp_path / "save"))
        assert status == 2 and "focal uses no reference model" in said
    pools(1)(trained, words=words("anchored", "--train-iters", 3, "--auto-resume"))
    assert entries(tmp_path / "save")[2]["metrics"]["distance"] > distances[1]
    pools(1)(trained, words=words("anchored", "--train-iters", 2, "--save", tmp_path / "alone"))
    assert [step["metrics"]["distance"] for step in entries(tmp_path / "alone")] == pytest.approx(distances, rel=1e-4)


def command(monkeypatch, capsys, *words: str) -> tuple[object, str]:
    """The command's entry point, within this process: its exit status, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["modellink-train", *words])
    capsys.readouterr()
    try:
        main()
    except SystemExit as left:
        return left.code, "".join(capsys.readouterr())
    return 0, "".join(capsys.readouterr())


def test_help_lists_it_and_a_misspelt_name_is_answered(monkeypatch, capsys):
    with installed():
        assert "Pretrain with focal loss." in command(monkeypatch, capsys, "--help")[1]
        assert "--gamma" in command(monkeypatch, capsys, "focal", "--help")[1]
        status, said = command(monkeypatch, capsys, "focl", "--lr", "1")
    assert status == 2 and "focal" in said
