# SPDX-License-Identifier: Apache-2.0
"""What switches of ops and of context parallelism really change: the form that is taken, what is sent, and when."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from ranks import beside

training = beside(__file__, "test_training")
CP2 = {"context_parallel_size": 2, "global_batch_size": 1, "exit_interval": 1}
RING = CP2 | {"context_parallel_algo": "megatron_cp_algo"}


@pytest.fixture
def texts(tiny, corpus):
    return {"load": str(tiny), "data_path": (str(corpus),)}


def forms(options: dict[str, Any]) -> tuple[float, dict[str, str]]:
    """On a rank: the loss of one iteration, and which form each op would take on a device that has a fused one of every op."""
    import importlib

    from modellink.kernels.ops import dispatch

    taken: dict[str, str] = {}
    modules = [importlib.import_module(f"modellink.kernels.ops.{op}") for op in dispatch.OPS]
    real = dispatch.form_of

    def recorded(op: str, device_type: str, forms: Any, plain: Any) -> Any:
        what = "fused" if real(op, "any", {"any": None}, plain) is None else "plain"
        assert taken.setdefault(op, what) == what
        return real(op, device_type, forms, plain)
    try:
        for module in modules:
            module.form_of = recorded
        return sum(step[2] for step in training.train(options)), taken  # of several ranks the last has the step
    finally:
        for module in modules:
            module.form_of = real


def test_without_a_switch_an_op_takes_its_plain_form_and_others_do_not(pools, texts):
    fused = dict.fromkeys(("adamw", "linear", "rms_norm", "rotary", "swiglu"), "fused")
    plain = {"use_flash_attn": "attention", "use_fused_rmsnorm": "rms_norm", "use_fused_swiglu": "swiglu",
             "use_fused_rotary_pos_emb": "rotary"}
    alone = texts | {"exit_interval": 1}
    losses = []
    for off in ([], ["use_flash_attn"], ["use_fused_rmsnorm", "use_fused_rotary_pos_emb"], ["use_fused_swiglu"]):
        ((loss, taken),) = pools(1)(forms, options=alone | dict.fromkeys(off, False))
        assert taken == fused | {"attention": "fused"} | {plain[name]: "plain" for name in off}, off
        losses.append(loss)
    assert losses == pytest.approx(losses[:1] * 4, rel=2e-6)
    for off, op in ((None, None), ("use_fused_ring_attention_update", "ring_update"), ("use_flash_attn", "attention_block")):
        for _, taken in pools(2)(forms, options=texts | RING | ({off: False} if off else {})):
            assert taken == fused | {"ring_update": "fused", "attention_block": "fused"} | ({op: "plain"} if op else {})


def passing(options: dict[str, Any]) -> tuple[list[str], set[Any], set[Any]]:
    """On a rank: what ring attention does in one iteration, in order, and the groups it sends and receives in."""
    import torch.distributed as dist

    from modellink.core.parallel import ring

    events: list[str] = []
    groups: dict[str, set[Any]] = {"isend": set(), "irecv": set()}
    computing = {name: getattr(ring, name) for name in ("attended", "attended_gradients")}
    transfers = {name: getattr(dist, name) for name in groups}

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def compute(name: str) -> Any:
        def call(*args: Any) -> Any:
            events.append("compute")
            return computing[name](*args)
        return call

    def transfer(name: str) -> Any:
        def call(*args: Any, group: Any) -> Watched:
            events.append("start")
            groups[name].add(group.group_name)
            return Watched(transfers[name](*args, group=group))
        return call
    try:
        for name in computing:
            setattr(ring, name, compute(name))
        for name in transfers:
            setattr(ring.dist, name, transfer(name))
        training.train(options)
    finally:
        for name, real in computing.items():
            setattr(ring, name, real)
        for name, real in transfers.items():
            setattr(ring.dist, name, real)
    return [event for event, _ in groupby(events)], groups["isend"], groups["irecv"]


FORWARD = {True: ["start", "compute", "wait", "compute"], False: ["compute", "start", "wait", "compute"]}
BACKWARD = {True: ["start", "compute", "wait", "start", "compute", "wait", "start", "wait"],
            False: ["compute", "start", "wait", "start", "wait", "compute", "start", "wait"]}
"""Of a layer on a ring of two, with overlap or without: keys and values pass once forward; backward they pass and their gradients
follow, home with the last transfer."""


@pytest.mark.parametrize("overlap", [True, False])
def test_a_ring_passes_on_while_it_computes_and_sends_and_receives_apart(pools, texts, overlap):
    for events, sent, received in pools(2)(passing, options=texts | RING | {"use_cp_send_recv_overlap": overlap}):
        assert events == [event for event, _ in groupby(FORWARD[overlap] * 4 + BACKWARD[overlap] * 4)]
        assert len(sent) == len(received) == 1 and (sent == received) == (not overlap)


def exchanged(options: dict[str, Any]) -> set[int]:
    """On a rank: how many heads for each rank are in the pieces that Ulysses exchanges."""
    import torch.distributed as dist

    heads: set[int] = set()
    real = dist.all_to_all_single

    def watched(out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        heads.add(x.size(3))
        return real(out, x, *args, **kwargs)
    try:
        dist.all_to_all_single = watched
        training.train(options)
    finally:
        dist.all_to_all_single = real
    return heads


def test_keys_are_repeated_for_every_head_before_the_exchange_where_that_is_asked_for(pools, texts):
    """The tiny model has 6 heads in 2 groups, for two ranks."""
    assert pools(2)(exchanged, options=texts | CP2) == [{3, 1}] * 2
    assert pools(2)(exchanged, options=texts | CP2 | {"kv_head_repeat_before_uly_alltoall": True}) == [{3}] * 2


def syncs(options: dict[str, Any]) -> tuple[set[str], set[str]]:
    """On a rank: when gradients begin to be summed, and when parameters begin to be gathered."""
    import torch
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    when: tuple[set[str], set[str]] = (set(), set())
    real = Group.start_grad_sync, Group.start_param_sync

    def of_gradients(self: Any, *args: Any, **kwargs: Any) -> Any:
        when[0].add("backward" if torch._C._current_graph_task_id() >= 0 else "behind it")
        return real[0](self, *args, **kwargs)

    def of_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
        when[1].add("forward" if torch.is_grad_enabled() else "optimizer")
        return real[1](self, *args, **kwargs)
    try:
        Group.start_grad_sync, Group.start_param_sync = of_gradients, of_parameters
        training.train(options)
    finally:
        Group.start_grad_sync, Group.start_param_sync = real
    return when


def test_gradients_and_parameters_travel_while_ranks_compute(pools, texts):
    two = texts | {"exit_interval": 2, "use_distributed_optimizer": True, "global_batch_size": 2}
    assert pools(2)(syncs, options=two) == [({"behind it"}, {"optimizer"})] * 2
    for of_gradients, of_parameters in pools(2)(syncs, options=two | {"overlap_grad_reduce": True}):
        assert "backward" in of_gradients and of_parameters == {"optimizer"}
    both = two | {"overlap_grad_reduce": True, "overlap_param_gather": True}
    for of_gradients, of_parameters in pools(2)(syncs, options=both):
        assert "backward" in of_gradients and "forward" in of_parameters
