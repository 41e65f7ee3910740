# SPDX-License-Identifier: Apache-2.0
"""High availability, in real processes: whatever fails, no step is lost and the losses are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import beside

from modellink.core.cli import _run
from modellink.core.config.faults import read_faults
from modellink.core.launch import free_port
from modellink.core.resilience.survivors import RankState, decide
from modellink.core.resilience.watch import Failure
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout

reuse_fp32, INSTRUCTIONS = beside(__file__, "test_reuse_fp32"), beside(__file__, "instructions")


@pytest.fixture
def options(tiny, corpus) -> list[str]:
    return ["--load", str(tiny), "--data-path", str(corpus), "--seq-length", "24", "--lr", "1e-3", "--train-iters", "8",
            "--global-batch-size", "8", "--eval-iters", "0", "--split", "100,0,0", "--device", "cpu"]


def trained(arguments: list[str]) -> None:
    """On a rank: what the command does there."""
    sys.argv[1:] = ["pretrain", *arguments]
    _run()


def start(options: list[str], save: Path, faults: str, *more: str) -> subprocess.Popen[str]:
    """A machine of a run with high availability."""
    patience = "12" if "kind=hang" in faults else "60"  # where no rank hangs, none that is only slow may be taken for one
    return subprocess.Popen(
        [sys.executable, "-m", "modellink.core.cli", "pretrain", *options, *more, "--save", str(save),
         "--enable-high-availability", "--hang-timeout", patience, "--inject-fault", faults],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def end(machine: subprocess.Popen[str], seconds: int = 600) -> str:
    """What it says; it ends well."""
    try:
        said = machine.communicate(timeout=seconds)[0]
    finally:
        machine.kill()  # the ranks end with it
    assert machine.returncode == 0, said[-3000:]
    return said


def watched(options: list[str], save: Path, faults: str, *more: str) -> str:
    return end(start(options, save, faults, *more))


def losses(save: Path) -> dict[int, float]:
    """By iteration; each stands there once."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines] == [*range(1, len(lines) + 1)]
    return {line["iteration"]: line["loss"] for line in lines}


def test_a_repairable_step_is_done_again_to_the_bit(pools, options, tmp_path):
    """A NaN, a weight that changes by itself, corrupted device memory, a full disk, a slow rank; a fault between two steps.

    The feed counts learned tokens over the ranks. A step that is over cannot be done again, so it is saved.
    """
    straight, save = tmp_path / "straight", tmp_path / "save"
    INSTRUCTIONS.write_set(tmp_path / "chats", INSTRUCTIONS.make_samples(30, 131))
    options[options.index("--data-path") + 1] = str(tmp_path / "chats")
    options += ["--is-instruction-dataset", "--variable-seq-lengths", "--nproc-per-node", "2"]
    pools(2)(trained, arguments=[*options, "--save", str(straight)])
    said = watched(options, save, "kind=nan,step=2,rank=1;kind=corrupt,step=3,rank=0;kind=memory,step=4,rank=1;"
                   "kind=disk,step=5,rank=0;kind=slow,step=6,rank=0;kind=memory,step=7,rank=0,when=end",
                   "--enable-optimizer-state-local-copy", "--save-interval", "5")
    assert said.count("is repeated") == 2 and "continues from iteration 3" in said and "continues without this checkpoint" in said
    assert said.count("; restarting") == 1 and "the surviving ranks save iteration 7" in said
    assert not (save / "iter_0000005").exists() and (save / "iter_0000008").exists()
    found, expected = losses(save), losses(straight)
    assert {step: found[step] for step in range(1, 8)} == {step: expected[step] for step in range(1, 8)}
    assert found == pytest.approx(expected, rel=2e-6)


def test_a_fault_behind_a_fault(pools, options, tmp_path):
    """A weight of the survivor changed before its peer failed; a rank is killed while the others wait for it to repair a step."""
    straight, save = tmp_path / "straight", tmp_path / "save"
    options += ["--nproc-per-node", "2", "--save-interval", "5"]
    pools(2)(trained, arguments=[*options, "--save", str(straight)])
    said = watched(options, save, "kind=corrupt,step=3,rank=1,when=end;kind=exception,step=4,rank=0;"
                   "kind=memory,step=7,rank=1;kind=kill,step=7,rank=0,when=repair", "--enable-optimizer-state-local-copy")
    assert "the surviving ranks save iteration 3" in said and "rank 0 is gone while the others wait for it" in said
    assert losses(save) == losses(straight)
    assert said.count("resuming from") == 2


@pytest.mark.parametrize("more", [
    ["--nproc-per-node", "2"],
    pytest.param(["--nproc-per-node", "4", "--use-distributed-optimizer"], marks=pytest.mark.stress),
    pytest.param(["--nproc-per-node", "4", "--tp", "2", "--sequence-parallel"], marks=pytest.mark.stress)], ids=" ".join)
def test_what_the_survivors_hold_is_saved(pools, options, tmp_path, more):
    """A rank hangs; the run starts again from the step before, with no other checkpoint."""
    straight, save = tmp_path / "straight", tmp_path / "save"
    pools(int(more[1]))(trained, arguments=[*options, *more, "--save", str(straight)])
    said = watched(options, save, "kind=hang,step=3,rank=1", *more)
    assert re.findall(r"the surviving ranks save iteration (\d)", said) == ["2"]
    assert said.count("; restarting") == 1 and said.count("resuming from") == 1
    assert losses(save) == pytest.approx(losses(straight), rel=2e-6)


@pytest.mark.stress
def test_a_rank_that_fails_again_is_left_out(pools, options, tmp_path):
    straight, save = tmp_path / "straight", tmp_path / "save"
    pools(2)(trained, arguments=[*options, "--save", str(straight), "--nproc-per-node", "2"])
    said = watched(options, save, "kind=kill,step=3,rank=3;kind=kill,step=3,rank=3", "--nproc-per-node", "4")
    assert "it failed twice without progress: restarting with 2 ranks" in said
    assert losses(save) == pytest.approx(losses(straight), rel=2e-6)


@pytest.mark.stress
def test_who_survives_on_another_machine_saves(pools, options, tmp_path):
    """Two agents with a rank each, as two machines have them."""
    straight, save = tmp_path / "straight", tmp_path / "save"
    pools(2)(trained, arguments=[*options, "--save", str(straight), "--nproc-per-node", "2"])
    more = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    machines = [start(options, save, "kind=kill,step=3,rank=1", *more) for _ in range(2)]
    said = "".join(map(end, machines))
    assert "the surviving ranks save iteration 2" in said
    assert losses(save) == losses(straight)


@pytest.mark.stress
@pytest.mark.parametrize(("count", "more"), [
    (140, ["--nproc-per-node", "2"]), (60, ["--nproc-per-node", "4", "--use-distributed-optimizer"])])
def test_random_faults_change_no_loss(pools, options, tmp_path, monkeypatch, count, more):
    """Two hundred over both layouts, of all kinds, at random steps and moments."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance, straight = random.Random(seed), tmp_path / "straight"
    options = [*options, "--train-iters", str(4 * count), "--max-restarts", str(2 * count)]
    kinds = ["exception", "kill", "hang", "nan", "corrupt", "memory", "disk", "slow"]
    faults = ";".join(
        f"kind={chance.choice(kinds)},step={4 * number + chance.randrange(2, 5)},rank={chance.randrange(int(more[1]))},"
        f"when={chance.choice(['start', 'update', 'end', 'random'])}" for number in range(count))
    monkeypatch.setattr("ranks.SECONDS", 1800)  # hundreds of steps are one call
    pools(int(more[1]))(trained, arguments=[*options, *more, "--save", str(straight)])
    end(start(options, tmp_path / "save", faults, *more, "--enable-optimizer-state-local-copy", "--save-interval", "20"), 7200)
    assert losses(tmp_path / "save") == pytest.approx(losses(straight), rel=2e-6)


@pytest.mark.parametrize(("bf16", "whole", "cut"), [(True, 6, 12), (False, 8, 8)])
def test_bytes_of_a_parameter_with_each_half_holding_all(pools, options, tmp_path, bf16, whole, cut):
    """4 ranks: each has the weight and its gradient; moments (and with bf16 fp32 parameters) are sharded across 2 of them."""
    given = {"load": options[1], "data_path": (options[3],), "bf16": bf16, "use_distributed_optimizer": True}
    given |= {"enable_high_availability": True, "save": str(tmp_path), "global_batch_size": 4}
    for size, count in pools(4)(reuse_fp32.held, options=given):
        assert size / count == pytest.approx(whole + 2 * cut / 4, abs=0.2)


FOUR = ParallelLayout(dp=4)


def states(*ranks: tuple[int, int, str]) -> dict[int, RankState]:
    return {rank: RankState(iteration, phase, (0, 0, 0, rank), False) for rank, iteration, phase in ranks}


def test_who_is_left_decides_what_was_finished():
    """One that has changed its weights takes the others, which are ready, with it; without one, nobody changes any."""
    applied = decide(states((0, 4, "ready"), (2, 4, "applying"), (3, 5, "begun")), Failure("gone", dead=[1]), 4, FOUR, 2)
    assert (applied.action, applied.iteration, applied.ranks) == ("save", 5, [0, 3])
    ready = decide(states((0, 4, "ready"), (3, 4, "begun")), Failure("gone", dead=[1, 2]), 4, FOUR, 2)
    assert (ready.action, ready.iteration, ready.ranks) == ("save", 4, [0, 3])
    between = decide(states((0, 4, "begun"), (3, 5, "begun")), Failure("gone", dead=[1, 2]), 4, FOUR, 2)
    assert (between.action, between.iteration) == ("save", 5)
    lost = decide(states((0, 4, "ready"), (2, 4, "ready")), Failure("gone", dead=[1, 3]), 4, FOUR, 2)
    assert lost.action == "lost" and "shard 1" in lost.why


@pytest.mark.parametrize(("text", "message"), [
    ("kind=kill,step=3", "does not describe a fault"), ("kind=flood,step=3,rank=0", "unknown kind of fault"),
    ("kind=kill,step=x,rank=0", "does not describe a fault"), ("kind=kill,step=1,rank=0,when=never", "unknown when of fault")])
def test_a_fault_that_is_none(text, message):
    with pytest.raises(ModelLinkError, match=message):
        read_faults(text)
