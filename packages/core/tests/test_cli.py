# SPDX-License-Identifier: Apache-2.0
"""The command itself, in real processes: one line of error, two ranks, a kill in the middle of a save."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from modellink.core.cli import _run, main
from modellink.core.prepare.prepare import prepare
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer

BARE = [sys.executable, "-m", "modellink.core.cli", "pretrain"]
SPAWN = "import sys; from modellink.core import launch; launch.GRACE = 0.2; sys.exit(launch.spawn(2, '{}', []))"
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +\d+/ +3 \| consumed samples: +\d+ \| elapsed time per iteration \(ms\): "
    r"[\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \| tokens per second per GPU: [\d.]+ \| "
    r"MFU: [\d.]+% of 0.1 TFLOP/s \| learning rate: \d\.\d{6}E[+-]\d\d \| global batch size: +2 \| "
    r"lm loss: (\d\.\d{6}E[+-]\d\d) \| loss scale: 1\.0 \| grad norm: \d+\.\d{3} \| number of skipped iterations: +0 \| "
    r"number of nan iterations: +0 \|$", re.MULTILINE)


def command(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BARE, *args], capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def options(tiny, corpus) -> list[str]:
    return ["--load", str(tiny), "--data-path", str(corpus), "--seq-length", "24", "--lr", "1e-3", "--train-iters", "3",
            "--global-batch-size", "2", "--eval-iters", "1", "--split", "80,10,10", "--log-interval", "1", "--device", "cpu",
            "--log-throughput", "--peak-tflops", "0.1"]


def test_two_ranks_train_tell_and_save(options, tmp_path):
    save = tmp_path / "save"
    done = command(*options, "--tp", "2", "--sequence-parallel", "--save", str(save))
    assert done.returncode == 0, done.stderr
    assert len(LINE.findall(done.stdout)) == 3
    summary = done.stdout.splitlines()[:3]
    assert summary[0].startswith("pretrain: llama, 0.1M parameters in float32, weights of ")
    assert summary[0].endswith(", 2 ranks on cpu (TP 2)")
    assert summary[1].endswith("words_text_document, 2 samples of 24 tokens per iteration")
    assert summary[2] == f"iterations 1 to 3, saved in {save} at the end; all settings in {save}/arguments.txt"
    assert "  tensor_model_parallel_size ...................... 2\n" in (save / "arguments.txt").read_text()
    log = (save / "train.log").read_text()
    assert len(LINE.findall(log)) == 3 and set(log.splitlines()) <= set(done.stdout.splitlines())
    for where in ("iteration 3 on validation set", "iteration 3 on test set"):
        line = rf"^ validation loss at {where} \| lm loss value: \S+ \| lm loss PPL: \S+ \| $"
        assert re.search(line, done.stdout, re.MULTILINE)
    assert f"  successfully saved checkpoint at iteration       3 to {save}" in done.stdout
    assert {path.name for path in save.iterdir()} == {
        "arguments.txt", "hf", "iter_0000003", "latest_checkpointed_iteration.txt", "loss.svg", "metrics.jsonl", "modellink.json",
        "train.log"}
    assert not [line for line in done.stderr.splitlines() if not line.startswith("loading weights: ")]  # nor any warning


def trained(arguments: list[str]) -> str:
    """On a rank: what the command does there; its output, or the message of a mistake."""
    sys.argv[1:] = ["pretrain", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            _run()
        except ModelLinkError as error:
            return str(error)
    return said.getvalue()


def test_a_preset_with_smaller_sizes_trains(pools, options, tmp_path):
    smaller = ["--num-layers", "2", "--hidden-size", "24", "--num-attention-heads", "4", "--num-query-groups", "2",
               "--ffn-hidden-size", "52", "--tp", "1", "--no-sequence-parallel", "--pp", "1", "--vocab-size", "131"]
    (said,) = pools(1)(trained, arguments=["--model", "qwen2-7b-32k", *options[2:], *smaller, "--print-arguments", "--save",
                                           str(tmp_path / "save")])
    assert "  bf16 ............................................ True" in said and "iteration        3/       3" in said
    assert json.loads((tmp_path / "save/modellink.json").read_text())["family"] == "qwen2"


def test_kills_while_saving_cost_one_interval(options, tmp_path):
    save = tmp_path / "save"
    options += ["--save", str(save)]
    killed = command(*options, "--train-iters", "1", "--lr-decay-iters", "3", MODELLINK_KILL_AT="before-tracker")
    assert killed.returncode == -9 and not (save / "latest_checkpointed_iteration.txt").exists()
    for point, behind in (("while-writing", True), ("before-rename", False)):
        # whole but not tracked still counts: the marker decides, not the tracker
        killed = command(*options, "--load", str(save), *["--async-save"] * behind, MODELLINK_KILL_AT=point)
        assert killed.returncode == -9 and f"resuming from {save / 'iter_0000001'} at iteration 1\n" in killed.stdout, point
        assert (save / "iter_0000003.tmp").exists()
    values = {"load": str(save), "data_path": (options[options.index("--data-path") + 1],), "seq_length": 24, "lr": 1e-3,
              "train_iters": 3, "device": "cpu"}
    assert prepare("pretrain", [Layer("test", values)]).resumed == save / "iter_0000001"


@pytest.mark.parametrize(("change", "message"), [
    (["--tp", "3"], "does not divide the 2 query groups"), (["--nonsense", "1"], "unknown option"),
    (["--config", "gone.yaml"], "configuration file is missing"), (["--model", "qwen2.5-7b"], "qwen2.5-7b-32k")])
def test_a_mistake_is_one_message_and_status_2(options, tmp_path, monkeypatch, capsys, change, message):
    save = tmp_path / "save"
    status, said = mistaken(monkeypatch, capsys, *options, "--save", str(save), *change)
    assert status == 2 and message in said and "Traceback" not in said
    assert not save.exists()


def mistaken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """The exit status and error output of the command's entry point, within this process."""
    monkeypatch.setattr(sys, "argv", ["modellink-train", "pretrain", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("kills", "pause"), [(1, 0.0), pytest.param(40, 0.3, marks=pytest.mark.stress)])
def test_kills_at_any_time_change_no_bit(pools, options, tmp_path, kills, pause):
    """One rank or all processes die; none outlives the others, and every restart resumes and reaches the same end.

    One rank is killed when the second iteration is logged, in the stress test also all, at random moments of training and
    saving. The undisturbed run, and the last part of the other, are those of ranks that are there already.
    """
    seed = random.SystemRandom().randrange(2**32) if pause else 0
    print(f"seed {seed}")
    chance, save = random.Random(seed), tmp_path / "save"
    options = [*options, "--tp", "2", "--save-interval", "1", "--train-iters", str(3 * kills)]
    pools(2)(trained, arguments=[*options, "--save", str(tmp_path / "straight")])
    for number in range(kills):
        start = ["--load", str(save)] if any(save.glob("iter_*[0-9]")) else []
        process = subprocess.Popen([*BARE, *options, *start, "--save", str(save), *["--async-save"] * chance.randrange(2)],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True)
        assert process.stdout is not None
        for _ in zip(range(chance.randrange(1, 3)), (line for line in process.stdout if "] iteration " in line), strict=False):
            pass
        time.sleep(chance.uniform(0, pause))
        one = number % 2 == 0
        ranks = [pid for pid in ranks_of(process.pid) if pid != process.pid]
        for pid in [chance.choice(ranks)] if one and ranks else [process.pid, *ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert not left_of(process.pid)
        print("one rank" if one else "all", "killed;", *sorted(path.name for path in save.glob("iter_*"))[-2:])
    start = ["--load", str(save)] if any(save.glob("iter_*[0-9]")) else []
    pools(2)(trained, arguments=[*options, *start, "--save", str(save)])
    straight, killed = ([(line["iteration"], line["loss"], line["grad_norm"])
                         for line in map(json.loads, (folder / "metrics.jsonl").open())]
                        for folder in (tmp_path / "straight", save))
    assert straight == killed and len(straight) == 3 * kills


WAITING = """
import time
from modellink.core import processes
from modellink.kernels.device import find
from modellink.kernels.parallel import ParallelLayout

processes.join(find("cpu"), ParallelLayout(dp=2), seed=1)
print("joined", flush=True)
time.sleep(3600)
"""


def test_ranks_do_not_outlive_their_launcher(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    process = subprocess.Popen([sys.executable, "-c", SPAWN.format("waiting")], cwd=tmp_path, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    assert process.stdout is not None
    joined = (line for line in process.stdout if line == "joined\n")
    assert len([*zip(range(2), joined, strict=False)]) == 2
    assert len(ranks_of(process.pid)) == 3
    process.kill()
    process.wait()
    assert not left_of(process.pid)


def left_of(session: int) -> list[int]:
    """Processes of a session that do not end by themselves; they are killed."""
    for _ in range(600):
        if not ranks_of(session):
            break
        time.sleep(0.1)
    left = ranks_of(session)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def ranks_of(session: int) -> list[int]:
    """Processes of a session that are still there."""
    return [process.pid for process in psutil.process_iter() if in_session(process, session)]


def in_session(process: psutil.Process, session: int) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session
    except (psutil.NoSuchProcess, ProcessLookupError):  # it has ended meanwhile
        return False


def test_a_yaml_file_says_the_same_and_an_unknown_key_is_named(pools, options, tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("optimizer: {lr: 0.5, train-iters: 1}\nlogging:\n  log_throughput: true\n")
    place = options.index("--train-iters")
    (said,) = pools(1)(trained, arguments=[*options[:place], *options[place + 2:], "--config", str(config), "--print-arguments"])
    assert "  lr .............................................. 0.001" in said  # the command line wins
    assert "iteration        1/       1" in said
    config.write_text("optimizer: {learning-rate: 0.5}\n")
    status, wrong = mistaken(monkeypatch, capsys, *options, "--config", str(config))
    assert status == 2 and wrong.startswith("error: unknown key 'learning_rate'") and str(config) in wrong
    assert "Traceback" not in wrong


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *BARE[2:]]


def test_a_mistake_under_torchrun_is_one_message(options):
    done = subprocess.run([*TORCHRUN, *options, "--tp", "2", "--exit-interval", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("error: --exit-interval") == 1
    assert "exitcode  : 2" in done.stderr  # of rank 0


def test_under_torchrun_every_process_is_a_rank(options):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps what was written at once together
    process = subprocess.Popen([*TORCHRUN, *options, "--tp", "2"], stdout=theirs, stderr=subprocess.DEVNULL)
    theirs.close()
    with ours:
        writes = [write.decode() for write in iter(lambda: ours.recv(2**16), b"")]
    assert process.wait() == 0
    assert len(LINE.findall("".join(writes))) == 3
    lines = [write for write in writes if "] iteration " in write or "[Rank " in write]
    assert len(lines) == 5 and all(write.endswith("\n") for write in lines)


def test_a_token_beyond_the_vocabulary_is_a_mistake_on_every_rank_and_leaves_nothing(pools, options, tmp_path):
    prefix, save = tmp_path / "high_text_document", tmp_path / "save"
    write_pair(prefix, [[5, 6, 7, 200] * 40] * 20)
    options[options.index("--data-path") + 1] = str(prefix)
    for said in pools(2)(trained, arguments=[*options, "--tp", "2", "--save", str(save)]):
        assert "token id 200 is outside the model's vocabulary of 131" in said
    assert not save.exists()


def write_pair(prefix: Path, documents: list[list[int]]) -> None:
    """A .bin/.idx pair by the file format's description (Megatron's IndexedDataset, version 1)."""
    lengths = [len(document) for document in documents]
    starts = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(struct.pack(f"<{len(document)}H", *document) for document in documents))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
        + struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
        + struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1)))


MISTAKEN = """
from modellink.core import launch, processes
from modellink.kernels.device import find
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.parallel import ParallelLayout

def main():
    processes.join(find("cpu"), ParallelLayout(dp=2), seed=1)
    with processes.cause_first():
        if launch.rank() == 1:
            raise ModelLinkError("a mistake")
        processes.dist.barrier()

run_command(main)
"""


def test_a_mistake_that_another_rank_finds_is_one_message(tmp_path):
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    done = subprocess.run([sys.executable, "-c", SPAWN.format("mistaken")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "rank 1 failed:\nerror: a mistake" in done.stderr and "Traceback" not in done.stderr


FAILING = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(open("/proc/nowhere/file"))
print("rank 0 waits", flush=True)
time.sleep(3600)
"""


def test_a_failing_rank_ends_the_run(tmp_path):
    """Rank 0, which would wait for ever, is stopped when its time to report an error is over."""
    (tmp_path / "failing.py").write_text(FAILING)
    done = subprocess.run([sys.executable, "-c", SPAWN.format("failing")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "rank 1 failed:\n" in done.stderr and "/proc/nowhere" in done.stderr
