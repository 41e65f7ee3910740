# SPDX-License-Identifier: Apache-2.0
"""What a run shows and writes about itself: terminal, train.log, metrics.jsonl, TensorBoard, loss.svg, arguments.txt."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import re
import resource
import shutil
import struct
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from ranks import beside
from screens import Recording, screen

from modellink.core.train.curve import WIDTH, draw_losses, thin
from modellink.core.train.history import POINTS, History, Step
from modellink.kernels import dependency_warnings

training = beside(__file__, "test_training")
EVALUATED = {"split": "60,20,20", "eval_interval": 2, "eval_iters": 2, "save_interval": 2}
LOSSES = {"lm loss", "lm loss validation", "lm loss validation ppl", "lm loss test", "lm loss test ppl"}
VALUES = {"learning-rate", "grad-norm", "loss-scale", "batch-size", "iteration-time", "throughput", "tokens-per-second",
          "mem-resident-bytes", "mem-max-resident-bytes"}


@pytest.fixture
def texts(tiny, corpus) -> dict[str, Any]:
    return {"load": str(tiny), "data_path": (str(corpus),), "log_interval": 2} | EVALUATED


def events(folder: Path) -> Iterator[tuple[int, str, float]]:
    """(iteration, tag, value) of every scalar in the event files of a folder, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, position = path.read_bytes(), 0
        while position < len(data):  # a record: length, its checksum, content, its checksum
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12:position + 12 + length])
            position += 16 + length
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_a_resumed_run_keeps_its_validation_losses_everywhere(pools, texts, tmp_path):
    save, board = tmp_path / "a", tmp_path / "events"
    options = texts | {"save": str(save), "tensorboard_dir": str(board)}
    pools(1)(training.train, options=options)
    for lost in (4, 5):  # the run got further than its last checkpoint: those iterations are logged again
        shutil.rmtree(save / f"iter_{lost:07d}")
    steps = pools(1)(training.train, options=options | {"load": str(save)})[0]

    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(step[0], step[2]) for step in steps]
    validation = {line["iteration"]: line["metrics"]["lm loss validation"] for line in lines if line["metrics"]}
    assert list(validation) == [2, 4, 5] and all(3 < loss < 6 for loss in validation.values())
    assert "lm loss test" in lines[4]["metrics"] and all(line.keys() == lines[0].keys() for line in lines)

    shown = list(events(board))
    assert {tag for _, tag, _ in shown} == LOSSES | VALUES
    assert [value for _, tag, value in shown[-100:] if tag == "lm loss validation"][-2:] == pytest.approx(
        [validation[4], validation[5]])
    assert {step: value for step, tag, value in shown if tag == "lm loss"} == pytest.approx({step[0]: step[2] for step in steps})
    perplexity = [value for step, tag, value in shown if tag == "lm loss validation ppl" and step == 2]
    assert perplexity == pytest.approx([math.exp(validation[2])])

    drawn = (save / "loss.svg").read_text()
    assert re.findall(r">(training|validation)<", drawn) == ["training", "validation"]
    assert [len(points.split()) for points in re.findall(r'<polyline points="([^"]*)"', drawn)] == [5, 3]
    log = (save / "train.log").read_text()
    assert re.findall(r"\] iteration +(\d)/", log) == ["2", "4", "5", "4", "5"]
    assert log.count("validation loss at iteration 5 on test set") == 2


def saves(options: dict[str, Any]) -> list[int]:
    """On a rank: the number of points in loss.svg at the end of each save."""
    from modellink.core.train.callbacks import Callback

    points: list[int] = []

    class Watch(Callback):
        def on_save(self, training: object, folder: Path) -> None:
            points.append(len(re.findall(r'points="([^"]*)"', (folder / "loss.svg").read_text())[0].split()))
    from modellink.core import api
    with patch.object(api, "train", lambda run, train=api.train: train(run, None, [Watch()])):
        training.train(options)
    return points


def test_the_curve_is_drawn_at_each_save(pools, texts, tmp_path):
    assert pools(1)(saves, options=texts | {"save": str(tmp_path / "a")}) == [[2, 4, 5]]


def on_a_terminal(options: dict[str, Any]) -> str:
    """On a rank: what a run writes to a terminal."""
    recording = Recording()
    with open(os.dup(recording.theirs), "w", encoding="utf-8") as terminal, patch.dict(os.environ, TERM="xterm"), \
            patch("modellink.kernels.terminal.PERIOD", 0.0), contextlib.redirect_stdout(terminal), \
            contextlib.redirect_stderr(terminal):
        training.train(options)
    return recording.close()


def test_a_terminal_shows_one_progress_line_and_no_log_lines(pools, texts, tmp_path):
    save = tmp_path / "a"
    (written,) = pools(1)(on_a_terminal, options=texts | {"save": str(save), "save_interval": 3})
    assert re.search(r"\[#+\.*\]  iteration 4/5  loss \d\.\d{4}  [\d,]+ tokens/s  0:00:\d\d left", written)
    assert "evaluating at iteration 5 on test set  1/2" in written
    *lines, last = [line for line in screen(written) if not line.startswith(("loading weights", "[Rank 0]"))]
    assert re.fullmatch(r"\[#{16}\]  iteration 5/5  loss \d\.\d{4}  [\d,]+ tokens/s  0:00:00 left", last)
    loss = r"loss \d\.\d{4}, perplexity [\d.]+"
    expected = [rf"iteration 2: validation {loss}", r"saving checkpoint at iteration       3 to .*",
                r"  successfully saved checkpoint at iteration       3 to .*", rf"iteration 4: validation {loss}",
                r"saving checkpoint at iteration       5 to .*", r"  successfully saved checkpoint at iteration       5 to .*",
                rf"iteration 5: validation {loss}", rf"iteration 5: test {loss}"]
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    assert len(re.findall(r"\] iteration +\d/", (save / "train.log").read_text())) == 3
    (written,) = pools(1)(on_a_terminal, options=texts | {"progress": False, "save_interval": None})
    assert len(re.findall(r"\] iteration +\d/", written)) == 3 and "tokens/s" not in written


def test_a_report_that_cannot_be_written_does_not_end_the_run(pools, texts, tmp_path):
    save = tmp_path / "a"
    for name in ("metrics.jsonl", "train.log", "loss.svg", "arguments.txt"):
        (save / name).mkdir(parents=True)
    (tmp_path / "events").touch()
    options = texts | {"save": str(save), "tensorboard_dir": str(tmp_path / "events")}
    (written,) = pools(1)(on_a_terminal, options=options)
    assert (save / "iter_0000005").is_dir()
    for name in ("metrics.jsonl", "train.log", "arguments.txt", save / "loss.svg", tmp_path / "events"):
        assert written.replace("\r\n", "").count(f"note: {name} cannot be written, and training continues without it") == 1


def test_settings_are_in_a_file_with_what_a_resumed_run_changes(pools, texts, tmp_path):
    save = tmp_path / "a"
    options = texts | {"save": str(save), "override_opt_param_scheduler": True}
    pools(1)(training.train, options=options | {"exit_interval": 2})
    first = (save / "arguments.txt").read_text()
    assert "  lr .............................................. 0.005\n" in first and "changed" not in first
    pools(1)(training.train, options=options | {"load": str(save), "exit_interval": 4, "lr": 0.01})
    pools(1)(training.train, options=options | {"load": str(save)})
    now, _, changes = (save / "arguments.txt").read_text().partition("changed when the run was resumed:\n")
    assert "  exit_interval ................................... None\n" in now
    assert [line for line in changes.splitlines() if "load " not in line] == [
        "  iteration 2: exit_interval 2 -> 4", "  iteration 2: lr 0.005 -> 0.01",
        "  iteration 4: exit_interval 4 -> None", "  iteration 4: lr 0.01 -> 0.005"]


def warned(options: dict[str, Any], *, hidden: bool) -> list[str]:
    """On a rank: the warnings of a run that is saved and resumed; `hidden`: as far as a command shows them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does
        if hidden:
            dependency_warnings.ignore()
        training.train(options | {"exit_interval": 2})
        training.train(options | {"load": options["save"]})
    return [str(warning.message) for warning in seen]


def test_warnings_of_dependencies_are_not_shown(pools, texts, tmp_path):
    options = texts | {"use_distributed_optimizer": True}
    assert pools(1)(warned, options=options | {"save": str(tmp_path / "a")}, hidden=True) == [[]]
    (shown,) = pools(1)(warned, options=options | {"save": str(tmp_path / "b")}, hidden=False)
    for text in ("deprecating ShardedTensor", "The .grad attribute of a Tensor"):  # still needed
        assert any(text in warning for warning in shown)


def step(iteration: int, **more: Any) -> Step:
    return Step(iteration=iteration, consumed_samples=iteration, global_batch_size=1, loss=1 / iteration, learning_rate=0.1,
                grad_norm=1.0, loss_scale=1.0, skipped=False, seconds=0.1, **more)


def test_an_evaluation_is_part_of_the_line_of_its_iteration(tmp_path):
    history = History(tmp_path, 0)
    for iteration in (1, 2):
        history.add(step(iteration))
    for loss in (1 / 3, 0.5, 0.25):  # shorter texts replace longer ones
        history.add_evaluation(2, {"lm loss validation": loss})
    history.add_evaluation(1, {"lm loss validation": 9.0})  # a repaired step may have no line
    history.add(step(3))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries == [asdict(item) for item in history.steps]
    assert [entry["metrics"] for entry in entries] == [{}, {"lm loss validation": 0.25}, {}]

    with (tmp_path / "metrics.jsonl").open("a") as file:  # of a later version, killed while writing
        file.write(json.dumps(asdict(step(4)) | {"new": 1}) + '\n{"iteration": 5, "lo')
    again = History(tmp_path, 4)
    assert [item.iteration for item in again.steps] == [1, 2, 3, 4]
    again.add_evaluation(4, {"lm loss test": 2.0})
    assert History(tmp_path, 9).curve("lm loss test") == [(4, 2.0)]


def test_a_file_that_cannot_be_written_is_told_once(tmp_path):
    """EFBIG, from the system; ENOSPC, EDQUOT and ESTALE arrive in the same way."""
    history = History(tmp_path, 0)
    history.add(step(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            history.add(step(2))
        history.add(step(3))
        history.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    history.add(step(4))
    assert [each.iteration for each in history.steps] == [4]  # there was no room for a temporary file either
    assert [point[0] for point in history.curve("loss")] == [1, 2, 3, 4]
    assert [each.iteration for each in History(tmp_path, 9).steps] == [1]


def test_what_is_in_memory_does_not_grow_with_the_run():
    history = History(None, 0)
    for number in range(1, 3 * POINTS):
        history.add(step(number))
    assert len(history.curve("loss")) <= 2 * POINTS and len(history.steps) == 3 * POINTS - 1
    kept = gc.get_objects()
    assert sum(isinstance(each, Step) for each in kept) < 10


def timed(options: dict[str, Any]) -> str:
    """On a rank: the log of a run whose clock advances by 100 seconds in every iteration of an evaluation, and else not."""
    from modellink.core.train.metrics import Metrics
    now, show = [0.0], Metrics.evaluating

    def evaluating(self: Any, where: str, done: int) -> None:
        now[0] += 100
        show(self, where, done)

    with contextlib.redirect_stdout(io.StringIO()) as printed, patch.object(Metrics, "evaluating", evaluating), \
            patch("modellink.core.train.metrics.time.perf_counter", lambda: now[0]):
        training.train(options)
    return printed.getvalue()


def test_the_time_between_two_lines_is_all_there(pools, texts):
    """Two evaluations of 2 iterations, after steps 2 and 4, and a line every 3 and 2 steps; nothing else takes time."""
    (log,) = pools(1)(timed, options=texts | {"save_interval": None, "log_interval": 3, "eval_interval": 2})
    assert re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log) == ["66666.7", "100000.0"]


@pytest.mark.parametrize("count", [100, 5_000, 100_001])
def test_a_long_curve_is_thinned_and_keeps_its_extremes(count):
    points = [(float(number), 5.0 + number % 7) for number in range(count)]
    points[count // 2] = (float(count // 2), 99.0)
    kept = thin(points)
    assert len(kept) <= 2 * WIDTH and kept == sorted(kept) and {points[0], points[-1], points[count // 2]} <= set(kept)
    assert set(kept) <= set(points)


def test_what_a_curve_shows():
    assert draw_losses({"training": [(1, 2.0)], "validation": []}) is None
    drawn = draw_losses({"training": [(1, 2.0), (2, math.nan), (3, 1.0)], "validation": [(3, 1.5)]})
    assert drawn is not None and "nan" not in drawn and drawn.count("<circle") == 3
    assert "validation" not in (draw_losses({"training": [(1, 2.0), (3, 1.0)], "validation": []}) or "")


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")


def reads(options: dict[str, Any]) -> list[dict[str, int]]:
    """On a rank: by place, how often the host reads a tensor's value in each step of a run; each read waits for the device."""
    import sys
    from collections import Counter

    import torch

    from modellink.core.train.loop import Loop
    steps: list[Counter[str]] = []
    iterate = Loop.iterate

    def counted(name: str) -> Any:
        read = getattr(torch.Tensor, name)

        def reading(self: Any, *more: Any) -> Any:
            frame = sys._getframe(1)
            if steps and "/torch/" not in frame.f_code.co_filename:
                steps[-1][f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1
            return read(self, *more)
        return reading

    def iterated(self: Any) -> None:
        steps.append(Counter())
        iterate(self)

    with contextlib.ExitStack() as patches:
        for name in READS:
            patches.enter_context(patch.object(torch.Tensor, name, counted(name)))
        patches.enter_context(patch.object(Loop, "iterate", iterated))
        training.train(options)
    return [dict(step) for step in steps]


EXPECTED = {"finite.refuse_not_finite": 1, "clip_grads.get_grad_norm_fp32": 1, "stop._anywhere": 1}
"""Loss, metrics and the check before the update; the gradient norm; the agreement to stop."""


@pytest.mark.parametrize("batch", [2, 8])
def test_the_host_waits_for_the_device_as_often_however_many_parameters_and_micro_batches_there_are(pools, texts, batch):
    options = texts | {"save_interval": None, "eval_iters": 0, "global_batch_size": batch, "train_iters": 3}
    first = {"loop._loss_scale": 1}
    assert pools(2)(reads, options=options) == [[EXPECTED | first, EXPECTED, EXPECTED]] * 2
