# SPDX-License-Identifier: Apache-2.0
"""A simulated NPU in this process: torch_npu itself over host memory, with PyTorch's own CPU kernels instead of those of CANN.

Real: torch_npu's front end, dispatch, autograd formulas, allocator, streams, and the host code of its operators up to the call
of a CANN kernel. Simulated: what a kernel computes. `load` comes before the first import of torch; `kernels` gives aten's
operators CPU kernels on the same memory; `operators` gives npu's those of operators.py, behind torch_npu's own; `collectives`
lets gloo move what HCCL would. Nothing here says what a real kernel computes, how fast, or in how much memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stubs import LIBRARIES, NO_FUNCTION, NO_OPERATOR

FOLDER = "MODELLINK_NPU"
"""The environment variable that names the folder with the wheel and the stand-ins."""
LEFT_ALONE = ("empty", "view", "as_strided", "_reshape_alias", "set_", "resize", "record_stream", "is_pinned", "_pin_memory",
              "pin_memory", "detach", "alias", "_has_compatible", "unfold", "_local_scalar_dense_", "is_set_to", "data")
"""Beginnings of aten operators that torch_npu computes without CANN: memory, shapes, storages."""
REACHED = re.compile(rf"call (aclnn\w+) failed, error code is {NO_OPERATOR}|"
                     rf"OPS function error: (\w+), error code is {NO_FUNCTION}")
reached: list[str] = []
"""The CANN kernels that calls of npu operators came to, in their order."""
calls: list[tuple[str, list[str], dict[str, str]]] = []
"""What we called npu operators with: name, types of the arguments by position, and by name."""
_generators: dict[Any, tuple[int, Any]] = {}
OLD_INTERFACE = {"npu_apply_adam_w"}
"""Operators that call CANN by its old interface, which lets go of Python's lock: they cannot be called with the lock held."""
_registered: list[Any] = []  # torch forgets kernels with their library


def load(count: int = 1, *, cann: bool = True) -> None:
    """Make torch_npu importable, with `count` devices; `cann` False leaves out the stand-ins, as where CANN is not installed."""
    folder = Path(os.environ[FOLDER])
    # else failing operators wait in a queue, and what they should have made is whatever the memory held
    os.environ |= {"TASK_QUEUE_ENABLE": "0", "ASCEND_LAUNCH_BLOCKING": "1", "NPU_STUB_COUNT": str(count)}
    sys.path.insert(1, str(folder / "wheel"))
    for name in LIBRARIES if cann else ():
        ctypes.CDLL(str(folder / "stubs" / name), mode=ctypes.RTLD_GLOBAL)


def kernel_of(call: Callable[[], object]) -> str:
    """The CANN kernel that one call of an npu operator comes to.

    Raises:
        RuntimeError: what the schema or torch_npu's own checks say before that.
    """
    try:
        call()
    except RuntimeError as error:
        if found := REACHED.search(str(error)):
            return found[1] or found[2]
        raise
    raise AssertionError("no CANN kernel was called")


def on_host(x: Any) -> Any:
    """A CPU tensor over the memory of an npu tensor, a CPU generator for an npu generator; anything else as it is."""
    import torch

    if isinstance(x, torch.Generator) and x.device.type == "npu":
        if x not in _generators or _generators[x][0] != x.initial_seed():
            _generators[x] = x.initial_seed(), torch.Generator().manual_seed(x.initial_seed())
        return _generators[x][1]
    if not isinstance(x, torch.Tensor) or x.device.type != "npu":
        return x
    assert x.device.index == local_rank(), f"{x.device} on local rank {local_rank()}"
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    raw = torch.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
    return torch.empty(0, dtype=x.dtype).set_(raw.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_device(x: Any) -> Any:
    """An npu tensor with the values of a CPU tensor; anything else as it is."""
    import torch

    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return x
    made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=torch.device("npu", torch.npu.current_device()))
    on_host(made).copy_(x.detach())
    return made


def _on_the_cpu(operator: Any) -> Callable[..., Any]:
    """The operator on the CPU, for npu tensors."""
    import torch
    from torch.utils._pytree import tree_map

    schema = operator._schema
    written = [number for number, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    returns_them = bool(schema.returns) and schema.returns[0].alias_info is not None

    def compute(*args: Any, **kwargs: Any) -> Any:
        to_host = False
        if kwargs.get("device") is not None:
            to_host, kwargs["device"] = torch.device(kwargs["device"]).type == "cpu", "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        result = operator(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if written and returns_them:
            given = [args[number] if number < len(args) else kwargs.get(schema.arguments[number].name) for number in written]
            return given[0] if len(schema.returns) == 1 else tuple(given)
        return result if to_host else tree_map(on_device, result)

    return compute


def kernels() -> int:
    """Give aten's operators for npu tensors CPU kernels on the same memory; how many they are."""
    import torch
    import torch_npu  # noqa: F401
    from torch.library import Library

    has, count = torch._C._dispatch_has_kernel_for_dispatch_key, 0
    library = Library("aten", "IMPL", "PrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, full = name.partition("::")
        base, _, overload = full.partition(".")
        if space != "aten" or base.startswith(LEFT_ALONE) or not (
                has(name, "PrivateUse1") or (has(name, "CPU") and not has(name, "CompositeExplicitAutograd"))):
            continue
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operator is None or any(argument.alias_info is not None and not argument.alias_info.is_write
                                   for argument in operator._schema.arguments):
            continue  # views
        library.impl(full, _on_the_cpu(operator), allow_override=True)
        count += 1
    library.impl("matmul_backward", _matmul_backward, allow_override=True)
    autograd = Library("aten", "IMPL", "AutogradPrivateUse1")
    autograd.impl("scaled_dot_product_attention", _attention, allow_override=True)
    _registered.extend((library, autograd))
    return count


def _matmul_backward(gradient: Any, left: Any, right: Any, mask: Any) -> tuple[Any, Any]:
    """torch_npu gives matmul a derivative of its own, within which autograd is shut out."""
    gradient, left, right = map(on_host, (gradient, left, right))
    rows = left[None] if left.dim() == 1 else left
    columns = right[:, None] if right.dim() == 1 else right
    gradient = gradient[..., None] if right.dim() == 1 else gradient
    gradient = gradient[..., None, :] if left.dim() == 1 else gradient
    of_left = (gradient @ columns.transpose(-1, -2)).sum_to_size(rows.shape).view(left.shape)
    of_right = (rows.transpose(-1, -2) @ gradient).sum_to_size(columns.shape).view(right.shape)
    return on_device(of_left), on_device(of_right)


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
               scale: float | None = None, enable_gqa: bool = False) -> Any:
    import torch

    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                                             enable_gqa=enable_gqa)[0]


def operators() -> None:
    """Let npu operators compute what operators.py says, each after torch_npu's own host code has come to a CANN kernel."""
    import torch
    from operators import MEANINGS
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.library import Library, get_kernel
    from torch.utils._pytree import tree_leaves, tree_map

    below, above = (Library("npu", "IMPL", key) for key in ("PrivateUse1", "AutogradPrivateUse1"))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    _registered.extend((below, above))

    def give(name: str, overload: str, meaning: Callable[..., Any]) -> None:
        operator = getattr(getattr(torch.ops.npu, name), overload)
        kernel, old = get_kernel(operator, "PrivateUse1"), name in OLD_INTERFACE

        def real(*args: Any, **kwargs: Any) -> Any:
            if not old:
                return kernel.call_boxed(keys, *args, **kwargs)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args, **kwargs)

        def compute(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
                return real(*args, **kwargs)
            reached.append(kernel_of(lambda: real(*args, **kwargs)))
            return tree_map(on_device, meaning(*tree_map(on_host, args), **tree_map(on_host, kwargs)))

        (above if old else below).impl(name if overload == "default" else f"{name}.{overload}", compute, allow_override=True)

    for name, meaning in MEANINGS.items():
        base, _, overload = name.partition(".")
        give(base, overload or "default", meaning)
        setattr(torch.ops.npu, base, _Recorded(base, getattr(torch.ops.npu, base)))


class _Recorded:
    """An operator that notes how it is called by its Python name: dispatch turns that into another order."""

    def __init__(self, name: str, operator: Any) -> None:
        self.name, self.operator = name, operator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls.append((f"{self.name}.out" if "out" in kwargs else self.name, [kind(value) for value in args],
                      {key: kind(value) for key, value in kwargs.items()}))
        return self.operator(*args, **kwargs)

    def __getattr__(self, overload: str) -> Any:
        return getattr(self.operator, overload)


def kind(value: Any) -> str:
    """The type of an argument as schemas name it."""
    import torch

    if isinstance(value, list | tuple):
        return f"{kind(value[0]) if value else ''}[]"
    if isinstance(value, torch.Tensor):
        return "Tensor"
    return "None" if value is None else type(value).__name__


def collectives() -> None:
    """Let gloo move npu tensors, in place of HCCL: whoever asks for "hccl" gets gloo on the same memory."""
    import torch
    import torch.distributed as dist
    from torch.library import Library
    from torch.utils._pytree import tree_map

    under_way: deque[Any] = deque(maxlen=256)  # gloo keeps a tensor on the host, which does not keep the memory of the device's
    library = Library("c10d", "IMPL", "PrivateUse1")
    _registered.append(library)
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("c10d::") or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
            continue
        base, _, overload = name.removeprefix("c10d::").partition(".")
        operator = getattr(getattr(torch.ops.c10d, base), overload or "default")

        def move(*args: Any, operator: Any = operator) -> Any:
            under_way.append(args)
            result = operator(*tree_map(on_host, args))
            return (args[0], result[1]) if isinstance(result, tuple) and len(result) == 2 else result
        library.impl(name, move, allow_override=True)

    def gloo(backend: str | None) -> str | None:
        return "cpu:gloo,npu:gloo" if backend == "hccl" else backend

    module: Any = dist.distributed_c10d
    start, group = module.init_process_group, module.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return start(gloo(backend), *args, **kwargs)

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return group(ranks, timeout, gloo(backend), *args, **kwargs)

    def batch_isend_irecv(operations: list[Any]) -> list[Any]:  # torch_npu calls a method that gloo has not
        return [one.op(one.tensor, one.peer, group=one.group, tag=one.tag) for one in operations]

    for made in (init_process_group, new_group, batch_isend_irecv):
        setattr(module, made.__name__, made)
        setattr(dist, made.__name__, made)
    dist.ProcessGroupGloo.get_hccl_comm_name = _comm_name


COMMUNICATORS: dict[str, Any] = {}
"""The backend of a process group by the name of its communicator."""


def _comm_name(backend: Any, rank: int) -> str:
    """Return HCCL's name of a communicator, an argument of operators, by the global rank."""
    import torch.distributed as dist

    assert rank == dist.get_rank(), f"asked by rank {rank}, this is {dist.get_rank()}"
    for name, known in COMMUNICATORS.items():
        if known is backend:
            return name
    name = f"communicator of {backend.size()} ranks, {len(COMMUNICATORS)}"
    COMMUNICATORS[name] = backend
    return name


def forbid_cuda() -> None:
    """From now on ModelLink and megatron-core fail when they touch torch.cuda."""
    import torch

    class Forbidden(type(torch.cuda)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("modellink.", "megatron.")):
                raise AssertionError(f"{caller} touches torch.cuda.{name}")
            return super().__getattribute__(name)

    torch.cuda.__class__ = Forbidden
