# SPDX-License-Identifier: Apache-2.0
"""Decode passes from graphs. On a CPU the captured function runs itself, over the buffers that an accelerator
would use."""

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
PROMPTS = [torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (1, 40, 17, 90, 33)]
OPTIONS = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": True}


def check_equal(found: list, expected: list) -> None:
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, two in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def captured(llama):
    """The llama model with graphs."""
    return load(llama, device="cpu", graphs=True)


def test_tokens_are_the_same_as_without_graphs(captured, engine, prompts):
    check_equal(captured.generate([*PROMPTS, *prompts], **OPTIONS),
                engine.generate([*PROMPTS, *prompts], **OPTIONS))


def test_one_graph_per_size(captured, monkeypatch):
    captures = []
    monkeypatch.setattr(Device, "capture", lambda _, work: captures.append(work) or work)
    (graphs,) = captured.network.fast_paths
    graphs._captured.clear()
    captured.generate(PROMPTS, max_new_tokens=60, ignore_eos=True)  # the longest exceeds 128 keys
    captured.generate(PROMPTS[:3], max_new_tokens=8, ignore_eos=True)
    assert set(graphs._captured) == {(8, 128), (8, 256), (4, 128)} and len(captures) == 3


def test_padding_sequences_write_to_no_page(captured, engine):
    """A batch of three, padded to four, leaves the pages of a stream that waits for its next token unchanged.
    """
    waiting = captured.stream(PROMPTS[3], max_new_tokens=30, ignore_eos=True)
    first = next(waiting)
    captured.generate(PROMPTS[:3], max_new_tokens=20, ignore_eos=True)
    assert first + "".join(waiting) == engine.generate([PROMPTS[3]], max_new_tokens=30,
                                                       ignore_eos=True)[0].text


@pytest.mark.parametrize("case", ["mistral window", "gemma2", "bloom", "gpt2"])
def test_windows_caps_slopes_and_learned_positions(tmp_path, case):
    MODELS.make(case, tmp_path)
    shortened = [[token % 131 for token in prompt][-24:] for prompt in PROMPTS]
    options = {"max_new_tokens": 16, "ignore_eos": True, "logprobs": True}
    expected = load(tmp_path / "weights", device="cpu").generate(shortened, **options)
    with_graphs = load(tmp_path / "weights", device="cpu", graphs=True)
    check_equal(with_graphs.generate(shortened, **options), expected)
    assert with_graphs.network.fast_paths[0]._captured


def test_a_failed_capture_falls_back_to_the_model(llama, engine, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(Device, "capture", fail)
    broken = load(llama, device="cpu", graphs=True)
    check_equal(broken.generate(PROMPTS, **OPTIONS), engine.generate(PROMPTS, **OPTIONS))
    assert broken.network.fast_paths[0].failed
    note = "decoding runs without graphs, capturing one failed: operation not"
    assert capsys.readouterr().err.count(note) == 1


def test_models_without_graphs(engine):
    from modellink.infer.graphs import unsupported_reason
    assert unsupported_reason(engine.spec, ParallelLayout()) is None
    assert "ranks" in str(unsupported_reason(engine.spec, ParallelLayout(tp=2)))
    assert "experts" in str(unsupported_reason(dataclasses.replace(engine.spec, num_experts=4),
                                               ParallelLayout()))


def test_sizes_are_powers_of_two():
    from modellink.infer.graphs import round_up
    assert [round_up(number) for number in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16] and round_up(3, 128) == 128
