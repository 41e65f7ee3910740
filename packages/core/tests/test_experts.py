# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts in training: the same losses at every layout, balance losses, saving and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside

OPTIONS = {"seq_length": 24, "micro_batch_size": 1, "global_batch_size": 4, "lr": 5e-3, "train_iters": 5, "exit_interval": 2,
           "eval_iters": 0, "split": "100,0,0", "device": "cpu", "seed": 7, "log_interval": 1, "make_vocab_size_divisible_by": 8,
           "moe_aux_loss_coeff": 0.05, "moe_device_level_aux_loss_coeff": 0.03, "moe_comm_aux_loss_coeff": 0.02,
           "moe_z_loss_coeff": 0.01}
EP2, TP2 = {"expert_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ALLTOALL, GROUPED = {"moe_token_dispatcher_type": "alltoall"}, {"moe_grouped_gemm": True}
ASYNC = {"moe_permutation_async_comm": True}
LAYOUTS = {
    "one": (1, {}), "ep2": (2, EP2), "ep2 alltoall": (2, EP2 | ALLTOALL), "tp2": (2, TP2),
    "ep2 distributed optimizer": (2, EP2 | {"use_distributed_optimizer": True}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "uneven": (2, {"pipeline_model_parallel_size": 2, "num_layer_list": "1,3"}),
    "tp2 mc2": (2, TP2 | {"use_mc2": True}), "grouped": (1, GROUPED), "ep2 grouped": (2, EP2 | GROUPED),
    "ep2 alltoall grouped": (2, EP2 | ALLTOALL | GROUPED), "tp2 ep2 grouped": (4, TP2 | EP2 | GROUPED),
    "grouped, activation": (1, GROUPED | {"recompute_activation_function": True}),
    "ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    "ring ep2 grouped": (2, EP2 | GROUPED | {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    "pp2 cp2": (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}),
    "ep2 together": (2, EP2 | ASYNC), "ep2 alltoall together": (2, EP2 | ALLTOALL | ASYNC),
    "tp2 ep2 together": (4, TP2 | EP2 | ASYNC | GROUPED),
    "uniform": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "swap": (1, {"swap_attention": True, "swap_modules": "self_attention,mlp"}),
    "vpp2 swap, feed-forward parts": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1,
                                          "swap_attention": True, "recompute_num_layers": 1}),
    "cp2": (2, {"context_parallel_size": 2}), "tp2 ep2": (4, TP2 | EP2),
    "pp2 ep2": (4, EP2 | {"pipeline_model_parallel_size": 2})}


train = beside(__file__, "test_training").train


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A DeepSeek-V2 with everything: latent attention, grouped and shared experts, a dense first layer."""
    import transformers

    sizes = beside(__file__, "models").TRANSFORMERS["deepseek_v2"][1]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture")
    transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(pools, mixture, corpus):
    """`run(layout, **options)`: the steps of a run; those of a layout alone are taken once."""
    known: dict[str, list[tuple[int, int, float, float]]] = {}

    def go(layout: str, **options: Any) -> list[tuple[int, int, float, float]]:
        world_size, more = LAYOUTS[layout]
        texts = OPTIONS | {"load": str(mixture), "data_path": (str(corpus),)} | more | options
        if options:
            return pools(world_size)(train, options=texts)[-1]
        if layout not in known:
            known[layout] = pools(world_size)(train, options=texts)[-1]
        return known[layout]
    return go


@pytest.fixture(scope="module")
def whole(run):
    return run("one")


ELSEWHERE = ("tp2 ep2", "ep2 grouped", "ep2 together")
"""Layouts of other tests, whose parts are among the layouts that are compared."""


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ELSEWHERE])
def test_two_steps_are_the_same_at_every_layout(run, whole, layout):
    steps = run(layout)
    assert [step[0] for step in steps] == [1, 2]
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole], rel=2e-6)
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in whole], rel=1e-5)


def under_way(options: dict[str, Any]) -> int:
    """On a rank: the most transfers between experts' ranks that the rank did not wait for at once, in one iteration."""
    import torch.distributed as dist

    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    real, now, most = {name: getattr(dist, name) for name in names}, 0, 0

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            nonlocal now
            now -= 1
            self.work.wait()

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal now, most
            work = real[name](*args, **kwargs)
            if work is None:  # it has arrived already
                return None
            now += 1
            most = max(most, now)
            return Watched(work)
        return call
    try:
        for name in names:
            setattr(dist, name, watched(name))
        train(options)
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return most


@pytest.mark.parametrize(("layout", "most"), [("ep2", 0), ("ep2 together", 3), ("ep2 alltoall", 0), ("ep2 alltoall together", 2)])
def test_what_goes_to_other_experts_travels_together(pools, mixture, corpus, layout, most):
    """Hidden states, scores and, where all are gathered, their routing."""
    world_size, more = LAYOUTS[layout]
    texts = OPTIONS | {"load": str(mixture), "data_path": (str(corpus),), "exit_interval": 1} | more
    assert pools(world_size)(under_way, options=texts) == [most] * 2


@pytest.mark.parametrize("layout", ["ep2", "tp2", "cp2", "uneven", "uniform"])
def test_balance_losses_are_logged_and_the_same_at_every_layout(run, tmp_path, layout):
    """The first stage of `uneven` has no experts."""
    def balance_of(layout: str) -> list[dict[str, float]]:
        save = tmp_path / layout.replace(" ", "_")
        run(layout, save=str(save), exit_interval=2, log_num_zeros_in_grad=True)
        lines = [json.loads(line) for line in (save / "metrics.jsonl").open()]
        assert all(line["num_zeros"] >= 0 for line in lines)
        return [line["balance"] for line in lines]
    one, other = balance_of("one"), balance_of(layout)
    assert len(one) == 2 and set(one[0]) == {"load_balancing_loss", "device_level_loss", "communication_loss", "z_loss"}
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5) and min(mine.values()) > 0


def grouped(folder: str, biased: bool) -> tuple[int, int, float]:
    """On a rank: (calls of single experts' linears, experts' matrices that are copied, largest difference of any gradient from
    experts one after the other)."""
    from dataclasses import replace

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.config import MoEConfig
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.kernels.device import find
    from modellink.kernels.ops.grouped_matmul import as_block
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), ParallelLayout(), seed=1)
    spec, grads, calls, copied = replace(open_checkpoint(Path(folder)).spec, add_mlp_bias=biased), [], 0, 0
    weights = None

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
    for on in (False, True):
        (model,) = build_models(spec, BuildSettings(moe=MoEConfig(moe_grouped_gemm=on)))
        if weights is None:
            weights = {name: torch.randn_like(value) * 0.1 for name, value in model.named_parameters()}
        model.load_state_dict(weights, strict=False)
        for name, module in model.named_modules():
            if on and name.endswith(".mlp.experts"):
                for fc in ("linear_fc1", "linear_fc2"):
                    matrices = [getattr(expert, fc).weight for expert in module.local_experts]
                    copied += as_block(matrices).data_ptr() != matrices[0].data_ptr()
            elif on and "local_experts" in name and ".linear_" in name:
                module.register_forward_hook(count)
        model.train()(torch.arange(24)[None]).square().mean().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if "shared" not in name})  # has no biases
    return calls, copied, max((grads[0][name] - grads[1][name]).abs().max().item() for name in grads[0])


@pytest.mark.parametrize("biased", [False, True])
def test_grouped_experts_are_one_product_over_weights_where_they_lie(pools, mixture, biased):
    calls, copied, difference = pools(1)(grouped, folder=str(mixture), biased=biased)[0]
    assert (calls, copied) == (0, 0) and difference < 1e-6


def test_a_checkpoint_of_grouped_experts_trains_grouped(pools, corpus, mixture, run, whole, tmp_path):
    from modellink.ckpt_convert import convert

    convert(mixture, tmp_path / "core", to="megatron-core", moe_grouped_gemm=True)
    steps = run("grouped", load=str(tmp_path / "core"))
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole], rel=2e-6)


@pytest.mark.parametrize("coefficient", ["moe_aux_loss_coeff", "moe_device_level_aux_loss_coeff", "moe_comm_aux_loss_coeff",
                                         "moe_z_loss_coeff", "seq_aux"])
def test_every_balance_loss_acts(run, coefficient):
    two = {"micro_batch_size": 2, "exit_interval": 1} if coefficient == "seq_aux" else {}  # of one sequence both are the same
    whole = run("one", **two)
    other = run("one", **{coefficient: True if coefficient == "seq_aux" else 0.0, "exit_interval": 1} | two)
    assert other[0][3] != pytest.approx(whole[0][3], rel=1e-6)


@pytest.mark.parametrize("layout", ["ep2", "ep2 distributed optimizer", "tp2 ep2", "pp2 ep2"])
def test_stopping_and_going_on_changes_no_bit(run, tmp_path, layout):
    straight = run(layout, exit_interval=3)
    stopped = run(layout, save=str(tmp_path / "a"), exit_interval=1)
    resumed = run(layout, load=str(tmp_path / "a"), exit_interval=3)
    assert stopped + resumed == straight  # the last loss needs the state of the optimizer


def test_what_was_trained_goes_on_elsewhere_and_becomes_a_hugging_face_folder(run, whole, tmp_path):
    from modellink.ckpt_convert import convert, open_checkpoint

    run("tp2 ep2", save=str(tmp_path / "a"), exit_interval=1)
    steps = run("vpp2", load=str(tmp_path / "a"))
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in whole[1:]], rel=2e-6)
    convert(tmp_path / "a", tmp_path / "hf", to="hf")
    first, second = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "hf")
    assert first.tensors.keys() == second.tensors.keys() and len(first.tensors) > 60
    for name, tensor in first.tensors.items():
        rows = [range(tensor.shape[0])]
        assert torch.equal(first.read(name, rows, 0), second.read(name, rows, 0)), name


def threads(runs: list[dict[str, Any]]) -> list[int]:
    """On a rank: the threads of its process after each of these runs; the groups of every layout have some."""
    found = []
    for options in runs:
        train(options)
        found.append(len(list(Path("/proc/self/task").iterdir())))
    return found


def test_a_run_leaves_no_groups_and_threads_behind(pools, mixture, corpus):
    """Models and optimizers hang on autograd's nodes, which hang on them."""
    texts = OPTIONS | {"load": str(mixture), "data_path": (str(corpus),), "exit_interval": 1}
    runs = [texts | more for more in (EP2 | {"use_distributed_optimizer": True}, TP2)]
    for _, _, *settled in pools(2)(threads, runs=runs * 3):  # the first two also drop what other tests left in the process
        assert settled[:2] == settled[2:]


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tokens_beyond_the_capacity_are_the_same_ones_at_every_layout(run, whole, policy):
    few = {"moe_token_dispatcher_type": "alltoall", "moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy}
    one = run("one", **few)
    assert one[0][2] != pytest.approx(whole[0][2], rel=1e-5)
    padded = run("one", **few, moe_pad_expert_input_to_capacity=True)
    for other in (padded, run("ep2", **few), run("pp2 ep2", **few)):
        assert [step[2] for step in other] == pytest.approx([step[2] for step in one], rel=2e-6)
        assert [step[3] for step in other] == pytest.approx([step[3] for step in one], rel=1e-5)


@pytest.mark.parametrize("factor", [-1.0, 100.0])
def test_with_room_for_all_no_token_is_dropped(run, whole, factor):
    steps = run("one", moe_token_dispatcher_type="alltoall", moe_expert_capacity_factor=factor)
    assert [step[2:] for step in steps] == [pytest.approx(step[2:], rel=2e-6) for step in whole]
