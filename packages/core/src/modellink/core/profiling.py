# SPDX-License-Identifier: Apache-2.0
"""Traces of some iterations (`--profile`): torch_npu's profiler on NPUs, torch's elsewhere.

    DIR/rank_0.*.pt.trace.json     one per rank, for chrome://tracing, Perfetto or TensorBoard; `distributed_args` has its layout
    DIR/rank_0_*_ascend_pt/        the same on an NPU, for its own tools
    DIR/summary.json               the printed summary (profile_summary.py)

megatron-core's timers appear as ranges in the trace: forward-compute, backward-compute, forward-recv, all-grads-sync and so on.
Not here: the meaning of the numbers in the summary.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.profiler
from megatron.core import parallel_state
from torch.profiler import record_function

from modellink.core import profile_summary
from modellink.core.profile_summary import Summary
from modellink.core.run import Run
from modellink.kernels.files import write_json
from modellink.kernels.messages import note


class Ranges:
    """Implements megatron-core's timers as ranges in the trace."""

    def __init__(self) -> None:
        self._known: dict[str, _Range] = {}

    def __call__(self, name: str, log_level: int = 0) -> _Range:
        return self._known.setdefault(name, _Range(name))


class _Range:
    def __init__(self, name: str) -> None:
        self._name, self._open = name, list[record_function]()

    def start(self, barrier: bool = False) -> None:
        self._open.append(record_function(self._name))
        self._open[-1].__enter__()

    def stop(self, barrier: bool = False) -> None:
        self._open.pop().__exit__(None, None, None)


class Profiler:
    """Context manager around the training loop; does nothing without --profile. Every rank calls `step` after each iteration."""

    def __init__(self, run: Run, models: Sequence[Any], iteration: int) -> None:
        self.run, self.config, self.models, self.first = run, run.profile, models, iteration + 1
        self.steps = 0
        ranks = self.config.profile_ranks
        self.mine = self.config.profile and (-1 in ranks or dist.get_rank() in ranks)
        self._profile: Any = None
        self._summary: Summary | None = None

    def __enter__(self) -> Profiler:
        if self.mine:
            self._profile = _make(self.run, self._ready)
            ranges = Ranges()
            for model in self.models:
                model.config.timers = ranges
            self._profile.start()
            self._say_where()
        return self

    def step(self) -> None:
        self.steps += 1
        if self._profile is not None:
            self._profile.step()
            self._say_where()
        if self.config.profile and self.steps == self.config.profile_step_end:
            self._end()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self.config.profile and self.steps < self.config.profile_step_end:
            self._end()
        elif self._profile is not None:  # other ranks may be gone, so nothing is gathered
            self._stop()

    def _say_where(self) -> None:
        """Add the layout to the trace when it starts."""
        if self.steps == self.config.profile_step_start:
            self._profile.add_metadata_json("distributed_args", json.dumps(distributed_args(self.run)))

    def _stop(self) -> None:
        self._profile.stop()
        self._profile = None
        for model in self.models:
            model.config.timers = None

    def _ready(self, profile: Any) -> None:
        """Write the trace of this rank and compute its summary."""
        traced = min(self.steps, self.config.profile_step_end) - self.config.profile_step_start
        if traced < 1:  # the run ended before the trace
            return
        folder, name = self.config.profile_save_path, f"rank_{dist.get_rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        _tools(self.run).tensorboard_trace_handler(str(folder), name)(profile)
        facts = {"rank": dist.get_rank(), "iterations": traced, "memory": self.run.device.memory()[1]}
        if self.run.device.kind == "npu":
            self._summary = profile_summary.of_npu(folder, name, **facts)
        else:
            self._summary = profile_summary.of_events(profile.events(), **facts)

    def _end(self) -> None:
        """Stop, and let rank 0 report on all ranks."""
        if self._profile is not None:
            self._stop()
        made: list[Summary | None] = [None] * dist.get_world_size()
        dist.all_gather_object(made, self._summary)
        if dist.get_rank() > 0:
            return
        if not (summaries := [summary for summary in made if summary is not None]):
            note(f"nothing was profiled: the run ended after {self.steps} iterations, and the first "
                 f"{self.config.profile_step_start} are skipped (--profile-step-start)")
            return
        start = self.first + self.config.profile_step_start
        end = start + summaries[0].iterations - 1
        where = f"iterations {start} to {end}, traces in {self.config.profile_save_path}"
        layout = self.run.layout
        ideal = profile_summary.ideal_bubble(layout.pp, layout.vpp, self.run.data.num_microbatches(layout.dp))
        print(profile_summary.text(where, summaries, ideal), flush=True)
        write_json(self.config.profile_save_path / "summary.json", [asdict(summary) for summary in summaries])


def distributed_args(run: Run) -> dict[str, Any]:
    """The layout and the position of this rank in it, under the original's names."""
    layout = run.layout
    return {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": layout.vpp, "context_parallel_size": layout.cp,
            "expert_model_parallel_size": layout.ep, "data_parallel_size": layout.dp,
            "sequence_parallel": run.parallel.sequence_parallel, "world_size": layout.world_size, "rank": dist.get_rank(),
            "tensor_model_parallel_rank": parallel_state.get_tensor_model_parallel_rank(),
            "pipeline_model_parallel_rank": parallel_state.get_pipeline_model_parallel_rank(),
            "context_parallel_rank": parallel_state.get_context_parallel_rank(),
            "data_parallel_rank": parallel_state.get_data_parallel_rank()}


def _tools(run: Run) -> Any:
    return importlib.import_module("torch_npu.profiler") if run.device.kind == "npu" else torch.profiler


def _make(run: Run, ready: Any) -> Any:
    """A profiler that skips the first iterations, warms up in the last of them, and traces up to the last."""
    config, tools, kind = run.profile, _tools(run), run.device.kind
    kinds = tools.ProfilerActivity
    activities = [kinds.CPU] if kind == "cpu" else [getattr(kinds, kind.upper())]
    if kind != "cpu" and config.profile_with_cpu:
        activities.append(kinds.CPU)
    warmup = min(1, config.profile_step_start)
    more = {"experimental_config": _npu_config(tools, config.profile_level)} if kind == "npu" else {}
    return tools.profile(
        activities=activities, record_shapes=config.profile_record_shapes, profile_memory=config.profile_with_memory,
        with_stack=config.profile_with_stack, on_trace_ready=ready, schedule=tools.schedule(
            wait=0, warmup=warmup, active=config.profile_step_end - config.profile_step_start, repeat=1,
            skip_first=config.profile_step_start - warmup), **more)


def _npu_config(tools: Any, level: str) -> Any:
    """The NPU profiler's configuration; utilization of the cores' pipes from level1 on."""
    options = {} if level == "level0" else {"aic_metrics": tools.AiCMetrics.PipeUtilization}
    return tools._ExperimentalConfig(profiler_level=getattr(tools.ProfilerLevel, level.capitalize()), **options)
