"""The doctor's measurements that need torch: devices, one collective, every op against its plain form."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink.kernels.device import Device, find
from modellink.kernels.ops.adamw import Settings
from modellink.kernels.ops.attention import Variant

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def devices(kind: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows about the device and a two-way trip through its collective backend; and what failed."""
    device = find(kind)  # type: ignore[arg-type]
    count = device.module.device_count() if device.module else 1
    rows: list[tuple[str, ...]] = [("device", str(device.torch)), ("count", str(count)),
            ("cpu threads", str(torch.get_num_threads())), ("backend", device.backend)]
    try:
        rows.append(("all_reduce over one rank", _collective(device)))
    except Exception as error:
        rows.append(("all_reduce over one rank", "failed"))
        return rows, [f"{device.backend}: {error}"]
    return rows, []


def _collective(device: Device) -> str:
    with tempfile.TemporaryDirectory() as folder:
        device.activate()
        dist.init_process_group(device.backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            x = torch.ones(4, device=device.torch)
            dist.all_reduce(x)
            return "works" if x.sum().item() == 4 else f"wrong sum {x.sum().item()}"
        finally:
            dist.destroy_process_group()


def op_cases(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Callable[..., Any]], torch.Tensor]]:
    """For each op a call on fixed inputs: give it the door or the plain form, it returns the result (and gradients) as one."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    def run(form: Callable[..., torch.Tensor], *inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = form(*inputs, **kwargs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        weight = torch.linspace(-1, 1, result.numel(), device=device).view(result.shape).to(result.dtype)
        grads = torch.autograd.grad(result, wanted, weight)
        return torch.cat([tensor.detach().float().flatten() for tensor in (result, *grads)])

    x, w = random(7, 3, 48), random(48)
    q, k, v = random(9, 2, 6, 16), random(9, 2, 3, 16), random(9, 2, 3, 16)
    angle = torch.randn(9, 1, 1, 8, generator=generator).repeat(1, 1, 1, 2).to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    lse = torch.randn(9, 2, 6, generator=generator).to(device)
    labels = torch.randint(0, 48, (7, 3), generator=generator).to(device)
    step = Settings(step=3, lr=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    rows, matrices, counts = random(12, 16), [random(8, 16) for _ in range(4)], [5, 0, 4, 3]
    state = [random(5, 8).detach().float().abs() for _ in range(4)]

    def stepped(form: Callable[..., None]) -> torch.Tensor:
        copies = [[tensor.clone()] for tensor in state]
        form(*copies, step)
        return torch.cat([tensor for (tensor,) in copies])

    return {
        "rms_norm": lambda form: run(form, x, w, epsilon=1e-5),
        "swiglu": lambda form: run(form, x),
        "rotary": lambda form: run(form, q, cos, sin),
        "attention": lambda form: run(form, q, k, v, variant=Variant(0.25), positions=None),
        "ring_update": lambda form: run(lambda *inputs: torch.cat([part.flatten() for part in form(*inputs)]), q.float(), lse,
                                        k.float().repeat_interleave(2, 2), lse.flip(0)),
        "grouped_matmul": lambda form: run(lambda rows, *matrices: form(rows, matrices, counts), rows, *matrices),
        "cross_entropy": lambda form: run(form, x, labels),
        "adamw": stepped,
    }


def ops(kind: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of op, form, dtype, difference; and the ops that differ from their plain form by more than is allowed."""
    device = find(kind).torch  # type: ignore[arg-type]
    rows: list[tuple[str, ...]] = []
    wrong = []
    for dtype, allowed in TOLERANCE.items():
        for name, case in op_cases(device, dtype).items():
            module = importlib.import_module(f"modellink.kernels.ops.{name}")
            form = "fused" if device.type in getattr(module, "FORMS", {}) else "torch"
            difference = (case(getattr(module, name)) - case(module.plain)).abs().max().item()
            good = difference <= allowed
            rows.append((name, form, str(dtype).removeprefix("torch."), f"{difference:.1e}", f"{allowed:.0e}",
                         "ok" if good else "wrong"))
            if not good:
                wrong.append(f"op {name} in {dtype} differs from its plain form by {difference:.1e}")
    return rows, wrong
