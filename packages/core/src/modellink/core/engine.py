# SPDX-License-Identifier: Apache-2.0
"""Puts megatron-core on a device; nothing else in the package depends on the kind of device.

megatron-core 0.16.1 hard-codes `torch.cuda`. On CUDA it runs as shipped. On a CPU or an NPU an import hook (rewrite.py) rewrites
these names in the source of `megatron.core.*` at import time; torch itself is not modified:

    torch.cuda.X                 -> _accel.X, the namespace of the chosen device
    "cuda", "torch.cuda.FloatTensor" as strings  -> the device's own names
    x.cuda(), x.is_cuda          -> x.to(_accel.current_device()), x.is_cpu or x.is_npu
    pin_memory=True              -> False on a CPU

`start` must run before anything imports megatron, so the entry point of every process calls it first. The five fixes below repair
what breaks without Transformer Engine and Apex on any device; tests/test_engine.py fails when one is no longer needed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import queue
import sys
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from modellink.core.rewrite import Finder
from modellink.kernels import dependency_warnings
from modellink.kernels.device import Device
from modellink.kernels.errors import InternalError, ModelLinkError

MEGATRON = "0.16.1"


class _Nothing:
    """Replaces streams, graphs and memory pools, which a synchronous device does not need."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


class _WallClockEvent(_Nothing):
    def record(self, *_: object) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _WallClockEvent) -> float:
        return (end.time - self.time) * 1e3


def _nothing(*_: object, **__: object) -> None: ...


def cpu_namespace() -> types.SimpleNamespace:
    """The part of torch.cuda that megatron.core uses, for a CPU."""
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def stream(*_: object, **__: object) -> _Nothing:
        return _Nothing()

    def no_memory(*_: object, **__: object) -> int:
        return 0

    tensors = {name: getattr(torch, name) for name in (
        "FloatTensor", "HalfTensor", "BFloat16Tensor", "ByteTensor", "IntTensor", "LongTensor", "DoubleTensor", "BoolTensor")}
    return types.SimpleNamespace(
        **tensors, OutOfMemoryError=torch.OutOfMemoryError, Stream=_Nothing, Event=_WallClockEvent, device=_Nothing,
        CUDAGraph=_Nothing, MemPool=_Nothing, default_generators={torch.device("cpu"): torch.default_generator},
        current_device=lambda: torch.device("cpu"), device_count=lambda: 1, is_available=lambda: False,
        manual_seed=torch.manual_seed, get_rng_state=get_rng_state, set_rng_state=set_rng_state,
        random=types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state),
        current_stream=stream, default_stream=stream, stream=stream,
        synchronize=_nothing, empty_cache=_nothing, set_device=_nothing, set_stream=_nothing, ipc_collect=_nothing,
        _lazy_init=_nothing, _lazy_call=lambda callback, **_: callback(),
        memory_allocated=no_memory, max_memory_allocated=no_memory, memory_reserved=no_memory, memory_stats=lambda *_: {},
        is_current_stream_capturing=lambda: False, get_device_capability=lambda *_: (0, 0),
        get_device_properties=lambda *_: types.SimpleNamespace(
            major=0, minor=0, multi_processor_count=1, total_memory=0, name="cpu"),
        amp=torch.cuda.amp,
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=contextlib.nullcontext))


def _torch_npu() -> Any:
    """torch.npu, which exists if torch_npu is installed."""
    return getattr(torch, "npu")  # noqa: B009 - the type checker knows no such module


class _NpuNamespace:
    """torch.npu, but `current_device` returns a torch.device, as megatron expects."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_torch_npu(), name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("npu", _torch_npu().current_device())

    @property
    def default_generators(self) -> dict[Any, torch.Generator]:
        """Generators by device number and by torch.device."""
        by_number = dict(enumerate(_torch_npu().default_generators))
        return by_number | {torch.device("npu", number): generator for number, generator in by_number.items()}


_started: str | None = None
_namespace: Any = None


def current_device() -> torch.device:
    """The device on which megatron-core creates tensors in this process."""
    if _namespace is None:  # CUDA: megatron-core as shipped
        return torch.device("cuda", torch.cuda.current_device())
    device: torch.device = _namespace.current_device()
    return device


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models built within the context have shapes but no memory: their tensors are on the `meta` device."""
    real = _namespace.current_device
    _namespace.current_device = lambda: torch.device("meta")
    try:
        with torch.device("meta"):
            yield
    finally:
        _namespace.current_device = real


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Within the context the package cannot be imported: megatron-core imports wandb, which takes a second, for its inference
    engine, and we use neither."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def start(device: Device) -> None:
    """Put megatron-core on `device` in this process; call it before megatron is first imported.

    Raises:
        ModelLinkError: another megatron-core version is installed.
        InternalError: megatron has been imported before, or is on another kind of device.
    """
    global _started, _namespace
    if _started == device.kind:
        return
    if _started is not None:
        raise InternalError(f"megatron-core runs on {_started} in this process and cannot move to {device.kind}")
    if device.kind != "cuda" and any(name.startswith("megatron.core") for name in sys.modules):
        raise InternalError("megatron.core was imported before the device was chosen")
    if (version := importlib.metadata.version("megatron-core")) != MEGATRON:
        raise ModelLinkError(f"megatron-core {version} is installed, ModelLink works with {MEGATRON}",
                             fix=f"python -m pip install megatron-core=={MEGATRON}")
    if device.kind != "cuda":
        _namespace = cpu_namespace() if device.kind == "cpu" else _NpuNamespace()
        sys.meta_path.insert(0, Finder(device.kind, _namespace))
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it warns at every fork of the RNG if there is one generator
    dependency_warnings.ignore()
    # Python hides what megatron-core says about its own modules unless it is run with -W, as in tests
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning), _hidden("wandb"):
        import megatron.core.distributed
        import megatron.core.models.backends
        import megatron.core.transformer.moe.moe_layer
        import megatron.core.transformer.transformer_block  # noqa: F401
        _fix()
    _started = device.kind


def _l2_norm(_chunk_size: int, _noop: object, lists: list[list[Any]], _per_tensor: object) -> tuple[Any, None]:
    """The norm over all tensors as a tensor of one number on their device; in place of Apex's multi_tensor_l2norm."""
    return torch.stack([torch.norm(tensor).float() for tensors in lists for tensor in tensors]).norm().view(1), None


def _fix() -> None:
    """Repair what megatron-core 0.16.1 gets wrong without Transformer Engine and Apex."""
    from megatron.core import optimizer, utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    from modellink.core.adam import Adam

    # 1. multi-latent attention assumes Transformer Engine and calls isinstance(module, a mock)
    multi_latent_attention.HAVE_TE = False
    # 2. the router's matmul uses a name that only Transformer Engine defines
    moe_utils.te_general_gemm = None
    # 3. recomputing an output reads the fp8 state, which only Transformer Engine has
    random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()
    # 4. the distributed optimizer's checkpoints expect Apex's Adam, with `step` in the parameter group
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = Adam, False
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_APEX_OPTIMIZER = Adam, True, True
    # 5. a save spawns a manager process (12 s, and it imports the main module again) for a queue that a save within
    #    this process does not need
    filesystem_async._results_queue = queue.Queue()
    # 6. the gradient norm reads one number per parameter on the host, and waits for the device each time
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
