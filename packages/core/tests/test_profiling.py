# SPDX-License-Identifier: Apache-2.0
"""Traces of some iterations: one file per rank with its position in the layout, and a summary that agrees with the trace."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from ranks import beside

from modellink.core import profile_summary
from modellink.core.profile_summary import Summary
from modellink.kernels.device import Device

training = beside(__file__, "test_training")
PP2 = {"pipeline_model_parallel_size": 2}
PEAK = 7 * 2**20
PROFILE: dict[str, Any] = {"profile": True, "profile_step_start": 1, "profile_step_end": 3}


def heard(options: dict[str, Any]) -> tuple[list[tuple[int, int, float, float]], str]:
    """On a rank: the steps of a run whose device reports a peak of `PEAK` bytes, and what it printed."""
    with (contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed),
          patch.object(Device, "memory", lambda _: (1, PEAK))):
        steps = training.train(options)
    return steps, printed.getvalue()


def test_a_trace_and_a_summary_of_every_rank(pools, tiny, corpus, tmp_path):
    texts = {"load": str(tiny), "data_path": (str(corpus),)} | PP2
    plain = pools(2)(training.train, options=texts)[-1]
    (_, printed), (steps, other) = pools(2)(heard, options=texts | PROFILE | {
        "profile_save_path": str(tmp_path), "profile_record_shapes": True, "profile_with_memory": True})
    assert steps == plain and "profile" not in other
    assert f"profile of iterations 2 to 3, traces in {tmp_path}" in printed
    assert "passes of equal duration: 20.0%" in printed  # 1 / (1 + 4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for rank, numbers in enumerate(summary):
        (file,) = tmp_path.glob(f"rank_{rank}.*.pt.trace.json")
        trace = json.loads(file.read_text())
        assert trace["distributed_args"] == trace["distributed_args"] | {
            "pipeline_model_parallel_size": 2, "pipeline_model_parallel_rank": rank, "rank": rank, "world_size": 2}
        events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
        named = {name: [event for event in events if event["name"] == name and event["cat"] == "user_annotation"]
                 for name in ("forward-compute", "backward-compute", "optimizer-step")}
        assert {name: len(found) for name, found in named.items()} == {
            "forward-compute": 8, "backward-compute": 8, "optimizer-step": 2}  # 4 micro batches, 2 iterations
        assert any("Input Dims" in event.get("args", {}) for event in events)
        iterations = [event for event in events if event["name"].startswith("ProfilerStep#")]
        start, end = iterations[0]["ts"], iterations[-1]["ts"] + iterations[-1]["dur"]
        assert len(iterations) == 2 and numbers["seconds"] == pytest.approx((end - start) / 2e6, rel=1e-3)
        computed = sum(event["dur"] for found in named.values() for event in found) / (end - start)
        assert 0 < numbers["bubble"] <= 1 - computed + 1e-3 and 0 < numbers["communication"] < 1
        assert (f"{rank:>6}{numbers['seconds'] * 1e3:>18.1f}{numbers['communication']:>16.1%}{numbers['bubble']:>10.1%}"
                f"{7.0:>19.1f}\n") in printed
        assert numbers["memory"] == PEAK and any(name.startswith("aten::") for name, _, _ in numbers["ops"])


def test_ranks_are_chosen_and_a_run_may_end_before(pools, tiny, corpus, tmp_path):
    texts = {"load": str(tiny), "data_path": (str(corpus),), "profile_save_path": str(tmp_path)} | PROFILE
    (_, printed), _ = pools(2)(heard, options=texts | {"profile_ranks": (1,), "exit_interval": 2})
    assert "profile of iterations 2 to 2" in printed and "slowest ops of rank 1" in printed
    assert [path.name.partition(".")[0] for path in tmp_path.glob("rank_*")] == ["rank_1"]
    (_, printed), _ = pools(2)(heard, options=texts | {"exit_interval": 1, "profile_save_path": str(tmp_path / "b")})
    assert "nothing was profiled: the run ended after 1 iterations" in printed and not list((tmp_path / "b").glob("*"))


def event(name: str, start: float, end: float, device: str = "CPU", annotation: bool = False) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=SimpleNamespace(name=device),
                           is_user_annotation=annotation, self_cpu_time_total=end - start, self_device_time_total=end - start)


def test_shares_are_of_the_union_of_what_goes_on():
    steps = [event("ProfilerStep#1", 0, 50, annotation=True), event("ProfilerStep#2", 50, 100, annotation=True)]
    host = [event("forward-compute", 0, 20, annotation=True), event("aten::mm", 0, 12), event("gloo:recv", 20, 50),
            event("gloo:all_reduce", 15, 30), event("backward-compute", 60, 80, annotation=True), event("aten::mm", 60, 70),
            event("gloo:send", 75, 90), event("aten::add", 100, 120)]
    found = profile_summary.of_events(steps + host, rank=3, iterations=2, memory=5)
    # transfers: 15 to 50, 75 to 90; computing or in a collective: 0 to 30, 60 to 80; what comes later is not of these iterations
    assert found == Summary(3, 2, 50e-6, 0.5, 0.5, 5, [("aten::mm", 22e-6, 2)])
    device = [event("gemm", 10, 40, "CUDA"), event("ncclDevKernel_SendRecv", 30, 60, "CUDA"),
              event("ncclDevKernel_AllReduce_Sum", 70, 80, "CUDA"), event("forward-compute", 0, 90, "CUDA", annotation=True)]
    found = profile_summary.of_events(steps + host + device, rank=0, iterations=2, memory=5)
    assert (found.communication, found.bubble, found.ops) == (0.4, pytest.approx(0.6), [("gemm", 30e-6, 1)])


def test_an_npus_own_files_are_read(tmp_path):
    assert profile_summary.of_npu(tmp_path, "rank_0", rank=0, iterations=2, memory=7) is None
    folder = tmp_path / "rank_0_20260101_ascend_pt/ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    (folder / "step_trace_time.csv").write_text(
        "Device_id,Step,Computing,Communication(Not Overlapped),Overlapped,Communication,Free,Stage,Bubble\n"
        "0,11,600,250,50,300,150,900,100\n0,12,600,250,50,300,150,900,100\n")
    (folder / "op_statistic.csv").write_text(
        "Device_id,OP Type,Core Type,Count,Total Time(us)\n0,Add,AIV,3,40\n0,MatMul,AIC,8,900\n")
    assert profile_summary.of_npu(tmp_path, "rank_0", rank=0, iterations=2, memory=7) == Summary(
        0, 2, 1000e-6, 0.3, 0.1, 7, [("MatMul", 900e-6, 8), ("Add", 40e-6, 3)])


def test_the_bubble_of_an_even_schedule():
    assert profile_summary.ideal_bubble(1, 1, 8) is None
    assert profile_summary.ideal_bubble(4, 1, 8) == pytest.approx(3 / 11) and profile_summary.ideal_bubble(4, 2, 8) == 3 / 19
