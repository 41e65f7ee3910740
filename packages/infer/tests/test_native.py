"""The compiled step computes what core's model computes; where it does not know a model, or is missing, the model runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside

from modellink.infer import load
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
MODELS = beside(str(Path(__file__).parents[2] / "core/tests/models.py"), "models")
ROWS = [torch.randint(3, 379, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (1, 40, 17, 90)]


@pytest.fixture(scope="module")
def engine(llama):
    """The llama model, few tokens at a time by the compiled step."""
    return load(llama, device="cpu", native=True)


def test_it_is_used_where_it_is_faster(engine, llama, monkeypatch, capsys):
    from modellink.infer.native import measure
    for compiled, model in ((1.0, 2.0), (2.0, 1.0)):
        seconds = iter([compiled, model])
        monkeypatch.setattr(measure, "seconds_a_token", lambda _, seconds=seconds: next(seconds))
        assert (load(llama, device="cpu", native=None, show=True).network.step is not None) == (compiled < model)
        assert f"{1e3 * compiled:.1f} ms a token compiled" in capsys.readouterr().err


def test_both_ways_are_measured(engine):
    from modellink.infer.native import measure
    step = engine.network.step
    faster, words = measure.pays(engine.network)
    assert engine.network.step is step and isinstance(faster, bool) and " ms as it is" in words


def passes(network: Any, rows: list[list[int]], cut: int) -> torch.Tensor:
    """Logits after pieces of each row and after its last token, the last tokens of all rows in one pass."""
    from modellink.infer.cache import Piece, Row
    cache = network.cache(rows=len(rows), piece=64, tokens=1024)
    held = [Row(list(row)) for row in rows]
    found = []
    for row in held:
        cache.tables.admit(row, shared=False)
        assert cache.tables.grow(row, len(row.tokens))
        while row.computed < len(row.tokens) - 1:
            piece = Piece(row, row.computed, min(cut, len(row.tokens) - 1 - row.computed))
            ids = torch.tensor([row.tokens[piece.start:piece.start + piece.count]])
            found.append(network.logits(ids, cache.state([piece]))[0])
            cache.tables.advance(row, piece.count, shared=False)
    pieces = [Piece(row, row.computed, 1) for row in held]
    return torch.cat([*found, network.logits(torch.tensor([[row.tokens[-1] for row in held]]), cache.state(pieces))[0]])


def both(network: Any, rows: list[list[int]], cut: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """What the step computes, and what the model does."""
    step = network.step
    assert step is not None
    with torch.inference_mode():
        first = passes(network, rows, cut)
        network.step = None
        second = passes(network, rows, cut)
        network.step = step
    return first, second


TAKEN = {"llama", "llama tied", "llama llama3", "llama llama3 tied", "llama linear", "qwen2", "qwen2 tied", "qwen2 yarn",
         "mistral", "mistral window", "gemma"}


@pytest.mark.parametrize("case", MODELS.TRANSFORMERS)
def test_it_computes_what_the_model_computes(tmp_path, case):
    MODELS.make(case, tmp_path)
    network = load(tmp_path / "weights", device="cpu", native=True).network
    assert (network.step is not None) == (case in TAKEN)
    if network.step is not None:
        torch.testing.assert_close(*both(network, [[token % 131 for token in row][-50:] for row in ROWS]), atol=1e-5, rtol=1e-4)


def test_other_layouts_and_precisions_are_not_taken(engine):
    from modellink.infer.native.view import takes
    cpu = torch.device("cpu")
    assert takes(engine.spec, ParallelLayout(), cpu, torch.float32) and takes(engine.spec, ParallelLayout(), cpu, torch.bfloat16)
    assert not takes(engine.spec, ParallelLayout(tp=2), cpu, torch.float32)
    assert not takes(engine.spec, ParallelLayout(), cpu, torch.float16)
    assert not takes(dataclasses.replace(engine.spec, post_norm=True), ParallelLayout(), cpu, torch.float32)


def test_half_precision_is_near(llama, engine):
    half = load(llama, device="cpu", dtype="bfloat16", native=True).network
    exact = both(engine.network, ROWS)[1].log_softmax(-1)
    ours, theirs = (found.log_softmax(-1) for found in both(half, ROWS))
    assert (ours - exact).square().mean() < 1.1 * (theirs - exact).square().mean()  # fp32 between the weights


def test_tokens_are_the_same_either_way(llama, engine, prompts):
    assert engine.network.step is not None
    plain = load(llama, device="cpu")
    assert plain.network.step is None
    assert plain.generate(prompts, max_new_tokens=40) == engine.generate(prompts, max_new_tokens=40)


def test_int8_is_near_and_says_how_near(llama, engine, capsys):
    small = load(llama, device="cpu", int8=True, show=True)
    assert 0.001 < small.network.step.error < 0.02
    assert f"{100 * small.network.step.error:.2f} %" in capsys.readouterr().err
    window = torch.randint(3, 379, (1, 120), generator=torch.Generator().manual_seed(0)).tolist()
    exact, near = (torch.tensor(engine.score(window)[0]) for engine in (engine, small))
    assert 0 < (exact - near).abs().mean() < 0.3 * exact.std()


@pytest.mark.parametrize("case", ["llama", "llama tied", "qwen2", "mistral window"])
def test_the_model_computes_with_the_int8_values_too(tmp_path, case):
    MODELS.make(case, tmp_path)
    exact, small = (load(tmp_path / "weights", device="cpu", native=True, int8=int8).network for int8 in (False, True))
    rows = [[token % 131 for token in row][-50:] for row in ROWS]
    step, model = both(small, rows)
    torch.testing.assert_close(step, model, atol=1e-5, rtol=1e-4)
    assert (model - both(exact, rows)[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_weights_take_the_place_of_the_others(folder, family):
    """The embedding stays, whose rows are looked up."""
    plain, small = (load(folder(family), device="cpu", int8=int8).network for int8 in (False, True))
    whole, left = (sum(one.nbytes for one in network._model.parameters()) for network in (plain, small))
    spec, step = plain.spec, small.step
    embedding = 4 * spec.vocab_size * spec.hidden_size
    held = sum(one.nbytes for one in step._held)
    assert embedding <= left < embedding + 0.05 * whole  # and the norms and biases
    assert held < 0.32 * whole + (embedding / 4 if spec.tied else 0)
    with torch.inference_mode():
        small.logits(torch.tensor([[5, 6]]))
    assert left == sum(one.nbytes for one in small._model.parameters())


def test_quantised_rows_are_within_half_a_step():
    from modellink.infer.native.int8 import Int8
    weight = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    narrow = Int8.of(weight)
    assert ((narrow.matrix(torch.float32) - weight).abs() <= 0.5001 * narrow.scale[:, None]).all()
    assert narrow.values.abs().max() == 127


def test_a_user_without_a_home_has_no_step(monkeypatch):
    from modellink.infer.native import compiled
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    compiled.step.cache_clear()
    try:
        assert compiled.step() is None
    finally:
        compiled.step.cache_clear()


@pytest.mark.parametrize("environment", [{"MODELLINK_NATIVE": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}])
def test_without_it_the_model_runs(llama, monkeypatch, environment, tmp_path):
    from modellink.infer.native import compiled
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.step.cache_clear()
    try:
        assert load(llama, device="cpu", native=True).network.step is None
        with pytest.raises(ModelLinkError, match="does not take this model"):
            load(llama, device="cpu", int8=True)
        assert not list(tmp_path.rglob("*.so"))
    finally:
        compiled.step.cache_clear()
