# SPDX-License-Identifier: Apache-2.0
"""When a run ends early, what it leaves, and what the next one takes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import beside

from modellink.kernels.errors import ModelLinkError

training = beside(__file__, "test_training")


@pytest.fixture
def run(pools, tiny, corpus):
    """`run(**options)`: the steps of a run of five iterations, of two ranks where data parallelism is asked for."""
    def go(ranks: int = 1, **options: Any) -> list[tuple[int, int, float, float]]:
        return pools(ranks)(training.train, options={"load": str(tiny), "data_path": (str(corpus),)} | options)[-1]
    return go


def iterations(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def test_a_run_whose_time_is_over_leaves_a_checkpoint_to_go_on_with(run, tmp_path):
    straight = run(2)
    stopped = run(2, save=str(tmp_path), exit_duration_in_mins=0)
    assert len(stopped) == 1 and iterations(tmp_path) == ["iter_0000001"]
    assert stopped + run(2, load=str(tmp_path)) == straight


def test_sigterm_saves_and_ends_the_run(tiny, corpus, tmp_path):
    command = [sys.executable, "-m", "modellink.core.cli", "pretrain", "--load", tiny, "--data-path", corpus,
               "--seq-length", "24", "--lr", "1e-3", "--train-iters", "100000", "--log-interval", "1", "--device", "cpu",
               "--eval-iters", "0", "--tp", "2", "--save", tmp_path / "save", "--save-interval", "1", "--save-total-limit", "1",
               "--async-save", "--exit-signal-handler"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if "iteration        3/" in line:
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait() == 0
    (folder,) = iterations(tmp_path / "save")
    assert f"leaving after iteration {int(folder[5:])}: SIGTERM" in output
    assert json.loads((tmp_path / "save" / folder / "training.json").read_text())["iteration"] == int(folder[5:])


def behind(options: dict[str, Any], interrupt: bool = False) -> list[tuple[int, int, float, float]]:
    """On a rank: a run whose background saves start to be written after the next iteration.

    With `interrupt` SIGTERM reaches the last rank while the save of the second iteration is under way.
    """
    import threading
    from unittest.mock import patch

    import torch.distributed as dist

    from modellink.core.train import writer

    free, sent = threading.Event(), threading.Event()
    staged, write, poll, wait = writer._staged, writer._write, writer.Writer.poll, writer.Writer.wait
    last = dist.get_rank() == dist.get_world_size() - 1

    def hold(*args: Any, **kwargs: Any) -> Any:
        free.clear()
        return staged(*args, **kwargs)

    def late(transforms: Any, number: int, bucket: Any) -> Any:
        if interrupt and last and "iter_0000002" in str(bucket[0]):
            os.kill(os.getpid(), signal.SIGTERM)
            sent.set()
        assert free.wait(60)
        return write(transforms, number, bucket)

    def polled(self: Any) -> None:  # after every iteration, before it is saved
        if interrupt and last and self._pending is not None:
            assert sent.wait(60)
        poll(self)
        free.set()

    def waited(self: Any) -> None:
        free.set()
        wait(self)

    with patch.multiple(writer, _staged=hold, _write=late), patch.multiple(writer.Writer, poll=polled, wait=waited):
        return training.train(options=options)


def test_saving_behind_training_changes_nothing(pools, run, tiny, corpus, tmp_path):
    """A save in the background has the weights of its own iteration, and only the newest saves are kept."""
    straight = run(2)
    options = {"load": str(tiny), "data_path": (str(corpus),), "save": str(tmp_path), "save_interval": 2}
    assert pools(2)(behind, options=options | {"save_total_limit": 2, "async_save": True})[-1] == straight
    assert iterations(tmp_path) == ["iter_0000004", "iter_0000005"]
    assert run(2, load=str(tmp_path), ckpt_step=4) == straight[4:]


def test_sigterm_while_a_save_is_on_its_way_leaves_it_whole_and_another(pools, run, tiny, corpus, tmp_path):
    straight = run(2)
    options = {"load": str(tiny), "data_path": (str(corpus),), "save": str(tmp_path), "save_interval": 2, "async_save": True}
    stopped = pools(2)(behind, options=options, interrupt=True)[-1]
    assert stopped == straight[:3] and iterations(tmp_path) == ["iter_0000002", "iter_0000003"]
    for iteration in (2, 3):
        assert straight[:iteration] + run(2, load=str(tmp_path), ckpt_step=iteration) == straight


def evaluating(options: dict[str, Any], after: int) -> tuple[list[Any], int]:
    """On a rank: a run that SIGTERM reaches on the last rank in evaluation iteration `after`: steps, evaluation iterations."""
    from unittest.mock import patch

    import torch.distributed as dist

    from modellink.core.train.metrics import Metrics

    show, done = Metrics.evaluating, [0]

    def shown(self: Any, where: str, number: int) -> None:
        show(self, where, number)
        done[0] += 1
        if done[0] == after and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Metrics, "evaluating", shown):
        return training.train(options=options), done[0]


@pytest.mark.parametrize(("after", "stopped", "evaluated"), [(3, 2, 3), (6, 4, 6), (10, 5, 10)])
def test_sigterm_in_an_evaluation_saves_after_its_running_iteration(pools, tiny, corpus, tmp_path, after, stopped, evaluated):
    """Evaluations of 4 iterations after steps 2 and 4 and twice at the end, which evaluates the validation data once."""
    options = {"load": str(tiny), "data_path": (str(corpus),), "save": str(tmp_path), "eval_interval": 2, "eval_iters": 4,
               "split": "80,10,10"}
    found = pools(2)(evaluating, options=options, after=after)
    assert [(len(steps or found[-1][0]), count) for steps, count in found] == [(stopped, evaluated)] * 2
    assert iterations(tmp_path) == [f"iter_{stopped:07d}"]


def without_room(options: dict[str, Any]) -> str:
    """On a rank: the output of a run that cannot write a file of more than 20 kB."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        training.train(options=options)
    except ModelLinkError as error:
        return error.what
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return ""


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_cannot_be_written_ends_the_run(pools, run, tiny, corpus, tmp_path, background):
    options = {"load": str(tiny), "data_path": (str(corpus),), "save": str(tmp_path), "save_interval": 2}
    run(2, **options, exit_interval=2)
    for said in pools(2)(without_room, options=options | {"load": str(tmp_path), "async_save": background}):
        assert "the checkpoint could not be written: rank 0: OSError: [Errno 27] File too large" in said
    assert iterations(tmp_path) == ["iter_0000002"]
    assert run(2, load=str(tmp_path))[-1][0] == 5


def printed_by(options: dict[str, Any]) -> str:
    """On a rank: the output of a run that fails."""
    with pytest.raises(ModelLinkError) as caught:
        training.train(options=options)
    return caught.value.what


def test_what_keeps_rank_0_from_saving_is_said_on_all(pools, tiny, corpus, tmp_path):
    (tmp_path / "hf").touch()
    for said in pools(2)(printed_by, options={"load": str(tiny), "data_path": (str(corpus),), "save": str(tmp_path)}):
        assert "the checkpoint could not be written: rank 0: FileExistsError" in said


def test_what_a_kill_left_goes_with_the_next_save(run, tmp_path):
    (tmp_path / "iter_0000001.tmp").mkdir()
    run(save=str(tmp_path), exit_interval=2)
    assert iterations(tmp_path) == ["iter_0000002"]


def drop(folder: str, iteration: int, keep: int) -> None:
    from modellink.core.train.checkpoint import drop_older, finish_removals

    drop_older(Path(folder), iteration, keep)
    finish_removals()


def test_what_is_kept_is_counted_back_from_the_save_of_now(pools, tmp_path):
    for number in (2, 3, 4, 9):
        (tmp_path / f"iter_{number:07d}").mkdir()
    pools(1)(drop, folder=str(tmp_path), iteration=4, keep=1)
    assert iterations(tmp_path) == ["iter_0000004", "iter_0000009"]


def test_an_earlier_iteration_can_be_continued(run, tmp_path):
    straight = run(save=str(tmp_path), save_interval=2)
    assert run(load=str(tmp_path), ckpt_step=2) == straight[2:]
    with pytest.raises(AssertionError, match="contains iter_0000005, which is later than --ckpt-step 2"):
        run(load=str(tmp_path), save=str(tmp_path), ckpt_step=2)


def test_a_loss_scale_that_overflows_is_halved_and_goes_on_as_it_was(run, tmp_path):
    """fp16: the steps that overflow change nothing but the scale, which a run that is continued has again."""
    scaled = {"fp16": True, "initial_loss_scale": 2.0 ** 24, "hysteresis": 1}
    straight = run(save=str(tmp_path / "straight"), train_iters=20, **scaled)
    lines = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").open()]
    scale = 2.0 ** 24
    for line in lines:
        scale /= 1 + line["skipped"]
        assert line["loss_scale"] == scale
    assert lines[0]["skipped"] and not lines[-1]["skipped"]
    run(save=str(tmp_path / "a"), train_iters=20, exit_interval=3, **scaled)
    assert run(load=str(tmp_path / "a"), train_iters=20, **scaled) == straight[3:]


def test_the_optimizer_can_start_from_zero(run, tmp_path):
    straight = run(save=str(tmp_path), save_interval=2)
    again = run(2, load=str(tmp_path), ckpt_step=2, load_optim=False, use_distributed_optimizer=True)
    assert [step[:2] for step in again] == [step[:2] for step in straight[2:]]
    assert again[0][2] == pytest.approx(straight[2][2], rel=2e-6)  # the weights are the same until the first step
    assert again[1][2] != pytest.approx(straight[3][2], rel=1e-4)


def test_the_random_state_can_start_from_zero(run, tmp_path):
    dropout = {"hidden_dropout": 0.3}
    straight = run(save=str(tmp_path), save_interval=2, **dropout)
    assert run(load=str(tmp_path), ckpt_step=2, **dropout) == straight[2:]
    assert run(load=str(tmp_path), ckpt_step=2, load_rng=False, **dropout)[0][2] != straight[2][2]


def test_the_batch_grows(run, tmp_path):
    grown = {"rampup_batch_size": (2, 1, 6), "micro_batch_size": 1}
    straight = run(**grown)
    assert [step[1] for step in straight] == [2, 4, 7, 11, 15]  # 4 samples are the whole batch, after 6 of them
    stopped = run(save=str(tmp_path), exit_interval=2, **grown)
    assert stopped + run(load=str(tmp_path), **grown) == straight
    for two, one in zip(run(2, **grown | {"rampup_batch_size": (2, 2, 6)}), run(**grown | {"rampup_batch_size": (2, 2, 6)}),
                        strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_run_of_samples(run, pools, tiny, corpus, tmp_path):
    """Whole batches of a ramp-up, a schedule that counts samples, and a stop in between."""
    samples = {"rampup_batch_size": (2, 1, 6), "train_iters": None, "train_samples": 18, "lr_warmup_iters": 0,
               "lr_warmup_samples": 4}
    straight = run(**samples)
    assert [step[1] for step in straight] == [2, 4, 7, 11, 15]  # three samples are less than another batch
    stopped = run(save=str(tmp_path), exit_interval=2, **samples)
    assert stopped + run(load=str(tmp_path), **samples) == straight
    with pytest.raises(AssertionError, match="the resumed run is measured by --train-samples"):
        run(load=str(tmp_path))


def test_a_run_made_longer_goes_on_in_its_order(run, tmp_path):
    """Constant rate: the first iterations of a longer run are those of the shorter one; their layout does not matter."""
    constant = {"lr_decay_style": "constant"}
    short = run(save=str(tmp_path), **constant)
    progress = json.loads((tmp_path / "iter_0000005/training.json").read_text())
    assert (progress["ordered"], progress["consumed_samples"]) == ([20], 20)
    longer = run(load=str(tmp_path), save=str(tmp_path), train_iters=40, exit_interval=20, save_interval=10, **constant)
    assert [step[0] for step in longer] == list(range(1, 21)) and longer[:5] == short
    assert json.loads((tmp_path / "iter_0000010/training.json").read_text())["ordered"] == [20, 140]
    again = run(2, load=str(tmp_path), ckpt_step=10, train_iters=20, tensor_model_parallel_size=2, **constant)
    assert [step[2] for step in again] == pytest.approx([step[2] for step in longer[10:20]], rel=2e-6)


def resumed(options: dict[str, Any]) -> tuple[list[float], str]:
    """On a rank: the learning rates of a run, and what it prints."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as printed:
        training.train(options=options)
    return [json.loads(line)["learning_rate"] for line in (Path(options["save"]) / "metrics.jsonl").open()], printed.getvalue()


def test_a_resumed_run_tells_what_changed_and_keeps_its_schedule_unless_told(pools, run, tiny, corpus, tmp_path):
    options = {"data_path": (str(corpus),), "save": str(tmp_path), "save_interval": 1, "train_iters": 4, "lr_warmup_iters": 0,
               "lr_decay_style": "linear", "lr": 4e-3}
    pools(1)(resumed, options=options | {"load": str(tiny)})
    longer = options | {"load": str(tmp_path), "train_iters": 8}
    with pytest.raises(AssertionError, match="another schedule: --lr-decay-iters was 4 and is 8"):
        run(**longer)
    ((rates, printed),) = pools(1)(resumed, options=longer | {"use_checkpoint_opt_param_scheduler": True, "lr": 1.0})
    assert rates == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3, 0, 0, 0, 0]) and " was " not in printed
    import shutil
    for number in range(5, 9):
        shutil.rmtree(tmp_path / f"iter_{number:07d}")
    changed = {"override_opt_param_scheduler": True, "lr": 8e-3, "adam_beta2": 0.95, "clip_grad": 0.5, "hidden_dropout": 0.1,
               "weight_decay": 0.2, "global_batch_size": 2, "exit_interval": 6}
    ((rates, printed),) = pools(1)(resumed, options=longer | changed)
    assert rates == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3, 4e-3, 3e-3])
    for line in ("--lr was 0.004 and is 0.008", "--lr-decay-iters was 4 and is 8", "--weight-decay was 0.01 and is 0.2",
                 "--adam-beta2 was 0.999 and is 0.95", "--clip-grad was 1.0 and is 0.5", "--hidden-dropout was 0.0 and is 0.1",
                 "the global batch size was 4 and is 2"):
        assert printed.count(line) == 1, line
    with pytest.raises(AssertionError, match="saved in float32 and this one is in bfloat16: the optimizer state does not fit"):
        run(**longer | changed | {"bf16": True, "exit_interval": 7})
    assert len(run(**longer | changed | {"bf16": True, "exit_interval": 7, "load_optim": False})) == 7


def test_evaluation_alone(run, tmp_path):
    assert run(skip_train=True, eval_iters=1, split="80,10,10", save=str(tmp_path)) == []
    assert not iterations(tmp_path)


def spoilt(folder: str, model: str) -> None:
    """On a rank: a copy of a Hugging Face folder whose model says NaN."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(file := str(Path(folder) / "model.safetensors"))
    weights["lm_head.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def test_a_loss_that_is_not_a_number_ends_the_run_and_leaves_the_batch(pools, run, tiny, tmp_path):
    pools(1)(spoilt, folder=str(tmp_path / "spoilt"), model=str(tiny))
    with pytest.raises(AssertionError, match=r"the loss is nan; the batch is in .*; no checkpoint has been saved"):
        run(2, load=str(tmp_path / "spoilt"), save=str(tmp_path / "save"))
    kept = tmp_path / "save/not_finite_0000001"
    assert np.load(kept / "tokens_dp0.npy").shape == np.load(kept / "labels_dp1.npy").shape == (2, 24)
    assert not iterations(tmp_path / "save")
    assert len(run(load=str(tmp_path / "spoilt"), check_for_nan_in_loss_and_grad=False)) == 5


@pytest.mark.parametrize("background", [False, True])
def test_weights_that_are_not_finite_are_not_saved(pools, run, tiny, corpus, tmp_path, background):
    """Steps without a gradient divide zero by --adam-eps; here it is one rank that has a bad moment in its second save."""
    options = {"load": str(tiny), "data_path": (str(corpus),), "save": str(tmp_path), "save_interval": 1, "save_total_limit": 1,
               "async_save": background}
    for said in pools(2)(broken, options=options):
        assert "exp_avg is not finite after iteration 2, so nothing is saved" in said
        assert f"the last valid checkpoint is {tmp_path}/iter_0000001" in said
    assert iterations(tmp_path) == ["iter_0000001"] and not list(tmp_path.glob("*.tmp"))
    assert run(2, load=str(tmp_path))[-1][0] == 5


def broken(options: dict[str, Any]) -> str:
    """On a rank: the message of a run, the first moment of whose last rank becomes infinite after the second step."""
    from unittest.mock import patch

    import torch
    import torch.distributed as dist

    from modellink.core.adam import Adam
    step = Adam.step

    def stepped(self: Any) -> None:
        step(self)
        if dist.get_rank() == dist.get_world_size() - 1 and self.param_groups[0]["step"] == 2:
            next(iter(self.state.values()))["exp_avg"].view(-1)[3] = torch.inf

    with patch.object(Adam, "step", stepped), pytest.raises(ModelLinkError) as caught:
        training.train(options=options)
    return str(caught.value)


def poisoned(value: float) -> str:
    """On a rank: the message about a gradient buffer with `value` on the last rank."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from modellink.core.train.finite import refuse_not_finite

    gradients = torch.ones(9)
    gradients[4] = value if dist.get_rank() == dist.get_world_size() - 1 else 0
    model = SimpleNamespace(buffers=[SimpleNamespace(grad_data=gradients)], expert_parallel_buffers=[])
    try:
        refuse_not_finite([model], torch.tensor([2.0]), "iteration 7", lambda: "kept")
    except ModelLinkError as error:
        return error.what
    return ""


def test_a_gradient_that_is_not_finite_is_found_on_every_rank(pools):
    assert pools(2)(poisoned, value=0.0) == ["", ""]
    for value in (float("inf"), float("nan")):
        assert all("a gradient is not" in said for said in pools(2)(poisoned, value=value))


def rates(settings: dict[str, Any]) -> list[tuple[float, float, float]]:
    """On a rank: (learning rate of the embedding, of a layer, weight decay of a layer) at each of five iterations."""
    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core import processes
    from modellink.core.config import OptimizerConfig, ParallelConfig
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.train.optimizer import make_optimizer, make_schedule, wrap
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(), seed=1)
    spec = ModelSpec(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, vocab_size=12,
                     max_position_embeddings=8)
    config = OptimizerConfig(**{"train_iters": 4, "lr": 1.0} | settings)
    config.check()
    models = wrap(build_models(spec, BuildSettings()), ParallelConfig())
    optimizer = make_optimizer(models, config, ParallelConfig())
    schedule, seen = make_schedule(optimizer, config), []
    for _ in range(5):
        groups = optimizer.param_groups
        decoupled = [group for group in groups if group["max_lr"] == config.decoupled_lr]
        words = (decoupled or groups)[0]
        layer = next(group for group in groups if group["wd_mult"] and group["max_lr"] == 1.0)
        seen.append((words["lr"], layer["lr"], layer["weight_decay"]))
        schedule.step(increment=10 if config.by_samples else 1)
    return seen


@pytest.mark.parametrize(("settings", "expected"), [
    ({"lr_warmup_iters": 2, "lr_warmup_init": 0.5, "lr_decay_style": "constant"}, [(0.5, 0.5, 0.01), (0.75, 0.75, 0.01)]),
    ({"lr_warmup_iters": 2, "lr_decay_style": "cosine", "lr_decay_iters": 6, "min_lr": 0.2},
     [(0.0, 0.0, 0.01), (0.5, 0.5, 0.01), (1.0, 1.0, 0.01), (0.8828, 0.8828, 0.01), (0.6, 0.6, 0.01)]),
    ({"lr_warmup_fraction": 0.5, "lr_decay_style": "inverse-square-root"},
     [(0.0, 0.0, 0.01), (0.5, 0.5, 0.01), (1.0, 1.0, 0.01), (0.8165, 0.8165, 0.01), (0.7071, 0.7071, 0.01)]),
    ({"train_iters": 0, "train_samples": 50, "lr_warmup_samples": 20, "lr_decay_samples": 40, "lr_decay_style": "linear"},
     [(0.0, 0.0, 0.01), (0.5, 0.5, 0.01), (1.0, 1.0, 0.01), (0.5, 0.5, 0.01), (0.0, 0.0, 0.01)]),
    ({"decoupled_lr": 4.0, "decoupled_min_lr": 2.0}, [(4.0, 1.0, 0.01), (3.5, 0.75, 0.01), (3.0, 0.5, 0.01)]),
    ({"start_weight_decay": 0.0, "end_weight_decay": 0.4, "weight_decay_incr_style": "linear", "lr_decay_style": "constant"},
     [(1.0, 1.0, 0.0), (1.0, 1.0, 0.1), (1.0, 1.0, 0.2), (1.0, 1.0, 0.3), (1.0, 1.0, 0.4)])])
def test_learning_rates_and_weight_decay_over_time(pools, settings, expected):
    (seen,) = pools(1)(rates, settings=settings)
    for found, wanted in zip(seen, expected, strict=False):
        assert found == pytest.approx(wanted, abs=5e-5)
