# SPDX-License-Identifier: Apache-2.0
"""The accelerator of this process, and the few things that differ between accelerators: one `Device` object.

CPU, CUDA and Ascend NPU. torch_npu is imported only if an NPU is requested. Not here: how megatron-core runs
on a device (core's engine.py) and the fused ops (ops/).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from modellink.kernels.errors import ModelLinkError

Kind = Literal["cpu", "cuda", "npu"]
# malloc.h; 32 MiB is the largest threshold glibc accepts
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Device:
    """One device; `index` counts the devices of its kind that this process can see."""

    kind: Kind
    index: int = 0

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def backend(self) -> str:
        """The torch.distributed backend for collectives between such devices."""
        return BACKENDS[self.kind]

    @property
    def module(self) -> ModuleType | None:
        """torch.cuda, torch.npu, or None for a CPU."""
        return None if self.kind == "cpu" else getattr(torch, self.kind)

    def activate(self) -> None:
        """Make it the current device of this process."""
        if self.module:
            self.module.set_device(self.index)
        else:
            _keep_memory()

    def synchronize(self) -> None:
        if self.module:
            self.module.synchronize()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        if self.module:
            self.module.manual_seed(seed)

    def memory(self) -> tuple[int, int]:
        """Return (allocated, peak allocated) in bytes; on a CPU the process's resident memory."""
        if self.module:
            return int(self.module.memory_allocated()), int(self.module.max_memory_allocated())
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak if (now := _resident()) is None else now, peak

    def memory_report(self) -> dict[str, int]:
        """Return bytes by name: those of `memory`, and on an accelerator the reserved ones."""
        allocated, peak = self.memory()
        report = {"allocated": allocated, "max allocated": peak}
        if self.module:
            report |= {"reserved": int(self.module.memory_reserved()),
                       "max reserved": int(self.module.max_memory_reserved())}
        return report

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return `work` captured as a graph: it launches all kernels at once, on the same tensors, and
        returns the same tensor.

        On a CPU, return `work` itself.

        Raises:
            RuntimeError: it does something that cannot be captured, such as waiting for the device.
        """
        if (module := self.module) is None:
            return work
        aside = module.Stream()
        aside.wait_stream(module.current_stream())
        with module.stream(aside):  # warm up: one-time allocations happen before the capture
            for _ in range(2):
                work()
        module.current_stream().wait_stream(aside)
        graph = module.CUDAGraph() if self.kind == "cuda" else module.NPUGraph()
        with module.graph(graph):
            output = work()

        def replay() -> Tensor:
            graph.replay()
            return output
        return replay

    def available(self) -> int:
        """Return the bytes that can still be allocated."""
        if self.module:
            return int(self.module.mem_get_info(self.index)[0])
        free = _available() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return free if (left := _left_by_limit()) is None else min(free, left)


def _keep_memory() -> None:
    """Make glibc keep freed tensor memory for later tensors: returned to the system, its pages would be
    cleared again."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        adjust = ctypes.CDLL(None).mallopt
        for name, value in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            adjust(name, value)


def _available() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None


def _left_by_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes left by a container's limit (control groups v2), with file pages counted as free;
    None: no limit."""
    try:
        name = next(line for line in own.read_text().splitlines() if line.startswith("0::"))[3:]
        folder = root / name.lstrip("/")
        # "max" is not a number: ValueError
        limit, used = (int((folder / file).read_text()) for file in ("memory.max", "memory.current"))
        kept = next(int(line.split()[1]) for line in (folder / "memory.stat").open()
                    if line.startswith("inactive_file "))
    except (OSError, StopIteration, ValueError):
        return None
    return max(0, limit - used + kept)


def _resident() -> int | None:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return None


def npu_available() -> bool:
    """Return whether torch_npu is installed and finds an NPU.

    Raises:
        ModelLinkError: it is installed, but its dependencies are not.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")  # adds torch.npu
    except ImportError as error:
        raise ModelLinkError(f"torch_npu cannot be loaded: {error}", where="CANN",
                             fix="source the set_env.sh of the CANN "
                             "toolkit, or uninstall torch-npu on a machine without an NPU") from error
    return bool(vars(torch)["npu"].is_available())


def _counted(device: Device) -> Device:
    assert device.module is not None
    if device.index >= (count := device.module.device_count()):
        raise ModelLinkError(f"process {device.index} of this machine has no device: there are {count}",
                             where="--device, --nproc-per-node", fix=f"start at most {count} processes")
    return device


def find(kind: Literal["auto", "cpu", "cuda", "npu"] = "auto", index: int = 0) -> Device:
    """Return the device to run on; `auto` prefers an NPU, then a CUDA GPU, then the CPU.

    Raises:
        ModelLinkError: the requested kind is not available, or has too few devices.
    """
    if kind in ("auto", "npu") and npu_available():
        return _counted(Device("npu", index))
    if kind in ("auto", "cuda") and torch.cuda.is_available():
        return _counted(Device("cuda", index))
    if kind in ("auto", "cpu"):
        return Device("cpu", index)
    raise ModelLinkError(f"no {kind} device is available", where="--device",
                         fix="run modellink-doctor to list the devices")
