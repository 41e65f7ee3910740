"""Passes of single tokens from graphs: on a CPU the captured function runs itself, over the buffers an accelerator would use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import beside

from modellink.infer import load
from modellink.kernels.device import Device
from modellink.kernels.parallel import ParallelLayout

MODELS = beside(str(Path(__file__).parents[2] / "core/tests/models.py"), "models")
ROWS = [torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (1, 40, 17, 90, 33)]
OPTIONS = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": True}


def same(found: list, expected: list) -> None:
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    for one, two in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def captured(llama):
    """The llama model, single tokens from graphs."""
    return load(llama, device="cpu", graphs=True)


def test_tokens_are_those_without(captured, engine, prompts):
    same(captured.generate([*ROWS, *prompts], **OPTIONS), engine.generate([*ROWS, *prompts], **OPTIONS))


def test_one_graph_for_each_size(captured, monkeypatch):
    counted = []
    monkeypatch.setattr(Device, "capture", lambda _, work: counted.append(work) or work)
    captured.network.graphs._made.clear()
    captured.generate(ROWS, max_new_tokens=60, ignore_eos=True)  # the longest passes 128 keys
    captured.generate(ROWS[:3], max_new_tokens=8, ignore_eos=True)
    sizes = set(captured.network.graphs._made)
    assert sizes == {(8, 128), (8, 256), (4, 128)} and len(counted) == 3


def test_rows_that_stand_in_for_none_write_where_nobody_reads(captured, engine):
    """Beside a batch of three, whose fourth row is none, the pages of a row that waits for its next token stay as they are."""
    waiting = captured.stream(ROWS[3], max_new_tokens=30, ignore_eos=True)
    first = next(waiting)
    captured.generate(ROWS[:3], max_new_tokens=20, ignore_eos=True)
    assert first + "".join(waiting) == engine.generate([ROWS[3]], max_new_tokens=30, ignore_eos=True)[0].text


@pytest.mark.parametrize("case", ["mistral window", "gemma2", "bloom", "gpt2"])
def test_windows_caps_slopes_and_learned_positions(tmp_path, case):
    MODELS.make(case, tmp_path)
    rows = [[token % 131 for token in row][-24:] for row in ROWS]
    options = {"max_new_tokens": 16, "ignore_eos": True, "logprobs": True}
    expected = load(tmp_path / "weights", device="cpu").generate(rows, **options)
    with_graphs = load(tmp_path / "weights", device="cpu", graphs=True)
    same(with_graphs.generate(rows, **options), expected)
    assert with_graphs.network.graphs._made


def test_what_cannot_be_captured_runs_as_it_is(llama, engine, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(Device, "capture", fail)
    broken = load(llama, device="cpu", graphs=True)
    same(broken.generate(ROWS, **OPTIONS), engine.generate(ROWS, **OPTIONS))
    assert broken.network.graphs.failed
    assert capsys.readouterr().err.count("no graph could be captured, single tokens are computed without: operation not") == 1


def test_models_that_are_never_captured(engine):
    from modellink.infer.graphs import refusal
    assert refusal(engine.spec, ParallelLayout()) is None
    assert "ranks" in str(refusal(engine.spec, ParallelLayout(tp=2)))
    assert "experts" in str(refusal(dataclasses.replace(engine.spec, num_experts=4), ParallelLayout()))


def test_sizes(engine):
    from modellink.infer.graphs import rounded
    assert [rounded(number) for number in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16] and rounded(3, 128) == 128
