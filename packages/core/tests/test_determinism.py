# SPDX-License-Identifier: Apache-2.0
"""Bit-identical repetition in every configuration, and digests that show the first difference of two runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ranks import beside

from modellink.core.determinism import deterministic, set_variables
from modellink.core.digests import Divergence, compare, digests
from modellink.core.repeatability import CONFIGURATIONS, rows, run_all
from modellink.kernels.errors import ModelLinkError

training = beside(__file__, "test_training")
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_configuration_gives_the_same_bits(pools, tmp_path, ranks):
    names = [name for name, (count, _) in CONFIGURATIONS.items() if count == ranks]
    for attempt in ("first", "second"):
        pools(ranks)(run_all, folder=str(tmp_path / attempt), names=names, more={"device": "cpu", "use_deter_comp": True})
    assert rows(tmp_path / "first", tmp_path / "second", names) == [(name, str(ranks), "yes", "yes", "") for name in names]
    victim = next((tmp_path / "second" / names[0] / "save").glob("iter_*/*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert rows(tmp_path / "first", tmp_path / "second", names[:1]) == [(names[0], str(ranks), "yes", "no", victim.name)]


@pytest.mark.stress
def test_the_table_of_the_command():
    done = subprocess.run([sys.executable, "-m", "modellink.core.cli", "determinism", "--device", "cpu"], capture_output=True,
                          text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    for name, (ranks, _) in CONFIGURATIONS.items():
        assert re.search(rf"^{name} +{ranks} +yes +yes$", done.stdout, re.MULTILINE), name


def test_an_operation_that_cannot_promise_its_bits_is_refused():
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    with deterministic(False, 1):
        put()
    with deterministic(True, 1), pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        put()
    put()


def test_the_libraries_of_an_accelerator_are_asked_where_the_user_has_not(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HCCL_DETERMINISTIC": "strict"})
    set_variables("cpu")
    set_variables("npu")
    assert os.environ == {"HCCL_DETERMINISTIC": "strict", "CLOSE_MATMUL_K_SHIFT": "1"}
    set_variables("cuda")
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")


def spoilt(options: dict[str, Any], where: str, iteration: int, name: str) -> bool:
    """On a rank: a run of which the last rank spoils one element of a gradient or a parameter; were operations deterministic?"""
    import torch.distributed as dist

    from modellink.core.model.load import bare
    from modellink.core.train import loop

    found, count = [], 0
    schedule, step = loop.run_schedule, loop.Digests.write

    def spoil(models: Any, attribute: str) -> None:
        parameter = dict(bare(models[0]).named_parameters())[name]
        with torch.no_grad():
            getattr(parameter, attribute).view(-1)[5] += 1e-3

    def late(method: Any, models: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        found.append(torch.are_deterministic_algorithms_enabled())
        loss, count = schedule(method, models, *args, **kwargs), count + 1
        if where == "gradient" and count == iteration and dist.get_rank() == dist.get_world_size() - 1:
            spoil(models, "main_grad")
        return loss

    def write(self: Any, number: int, loss: Any) -> None:
        if where == "parameter" and number == iteration and dist.get_rank() == dist.get_world_size() - 1:
            spoil(self.training.models, "data")
        step(self, number, loss)
    try:
        loop.run_schedule, loop.Digests.write = late, write
        training.train(options)
    finally:
        loop.run_schedule, loop.Digests.write = schedule, step
    assert not torch.are_deterministic_algorithms_enabled()
    return all(found)


@pytest.fixture(scope="module")
def straight(pools, tiny, corpus, tmp_path_factory):
    """The options of a run of two ranks, and the folder of its digests."""
    folder = tmp_path_factory.mktemp("straight")
    options = {"load": str(tiny), "data_path": (str(corpus),)} | TP2
    assert pools(2)(spoilt, options=options | {"log_digest": str(folder)}, where="", iteration=0, name="") == [False] * 2
    return options, folder


@pytest.mark.parametrize(("where", "iteration", "name"), [
    ("gradient", 3, "decoder.layers.2.mlp.linear_fc2.weight"), ("parameter", 2, "decoder.layers.1.input_layernorm.weight")])
def test_where_two_runs_part_is_named(pools, straight, tmp_path, where, iteration, name):
    options, folder = straight
    given = options | {"log_digest": str(tmp_path), "use_deter_comp": True}
    assert pools(2)(spoilt, options=given, where=where, iteration=iteration, name=name) == [True] * 2
    assert compare(folder, tmp_path) == (5, 2, Divergence(iteration, 1, where, name, 0))
    said = CliRunner().invoke(digests, [str(folder), str(tmp_path)])
    assert (said.exit_code, said.stdout) == (1, f"the runs diverge at iteration {iteration}, rank 1: {where} of {name}\n")


def test_a_run_that_is_continued_has_the_digests_of_one_that_was_not(pools, straight, tmp_path):
    options, folder = straight
    given = options | {"log_digest": str(tmp_path / "digests")}
    pools(2)(training.train, options=given | {"save": str(tmp_path), "save_interval": 2, "exit_interval": 4})
    pools(2)(training.train, options=given | {"load": str(tmp_path), "ckpt_step": 2})  # iterations 3 and 4 are repeated
    said = CliRunner().invoke(digests, [str(folder), str(tmp_path / "digests")])
    assert (said.exit_code, said.stdout) == (0, "bit-equal: 5 iterations on 2 ranks, loss, gradients and parameters\n")
    pools(2)(training.train, options=given | {"seed": 8, "exit_interval": 2})
    assert compare(folder, tmp_path / "digests")[2] == Divergence(1, 0, "loss", "", 1)
    with pytest.raises(ModelLinkError, match="2 and 0 ranks have digests"):
        compare(folder, tmp_path)


def test_of_several_differences_the_earliest_is_named(tmp_path):
    """Backward goes from the output layer to the embedding; the stage that holds the later layers is rank 1."""
    names = [["embedding.word_embeddings.weight", "decoder.layers.9.mlp.linear_fc1.weight"],
             ["decoder.layers.10.mlp.linear_fc1.weight", "decoder.layers.10.mlp.linear_fc2.weight"]]

    def write(run: str, gradients: list[list[str]], parameters: list[list[str]]) -> Path:
        for rank in (0, 1):
            lines = [{"names": names[rank]}, {"iteration": 1, "loss": "0x1", "gradients": gradients[rank],
                                              "parameters": parameters[rank]}]
            (tmp_path / run).mkdir(exist_ok=True)
            (tmp_path / run / f"rank_{rank:05d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
        return tmp_path / run
    plain = write("a", [["0", "0"]] * 2, [["0", "0"]] * 2)
    ones = [["1", "1"]] * 2
    for name, gradients, parameters, expected in (
            ("b", [["1", "1"], ["1", "0"]], ones, Divergence(1, 1, "gradient", names[1][0], 2)),
            ("c", [["1", "1"], ["0", "0"]], ones, Divergence(1, 0, "gradient", names[0][1], 1)),
            ("d", [["0", "0"]] * 2, [["0", "1"], ["1", "1"]], Divergence(1, 0, "parameter", names[0][1], 2))):
        assert compare(plain, write(name, gradients, parameters))[2] == expected


def numbers(seed: int) -> list[bool]:
    """On a rank: for each kind of number, whether digests tell apart tensors that differ in a bit, or in the order."""
    from modellink.core.train.digest import WORDS, digest

    generator, distinguished = torch.Generator().manual_seed(seed), []
    for size, words in WORDS.items():
        x = torch.randint(-100, 100, (1 << 21,), generator=generator).to(words)
        for place in (0, 1, 70_000, (1 << 20) + 1, (1 << 21) - 1):
            for bit in range(0, 8 * size, 3):
                other = x.clone()
                other[place] ^= torch.tensor(1, dtype=words) << bit
                distinguished.append(bool(digest(other) != digest(x)))
        other = x.clone()
        other[:5], x[:5] = torch.arange(5), torch.arange(5).flip(0)
        distinguished.append(bool(digest(other) != digest(x)) and bool(digest(x) == digest(x.clone())))
    return distinguished


def test_a_digest_tells_tensors_apart(pools):
    assert all(pools(1)(numbers, seed=3)[0])
