# SPDX-License-Identifier: Apache-2.0
"""Every op of kernels.ops, in each of its uses, with gradients, in fp32, bf16 and fp16: against its plain
form on the device, and against the plain form on the CPU."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from registry import Machine, require, row

OPS = ("adamw", "attention", "attention_block", "attention_block_gradients", "cross_entropy",
       "grouped_matmul", "linear", "ring_update", "rms_norm", "rotary", "swiglu", "all_gather_matmul",
       "matmul_reduce_scatter", "matmul_all_reduce")
"""The last three join a product with a collective, here over a group of one rank."""


def names() -> list[str]:
    """On a rank: the ops of kernels.ops."""
    from modellink.kernels import ops

    return [name for name in ops.__all__ if name != "plain_forms"]


def compare(op: str) -> dict[str, Any]:
    """On a rank: the number of uses, the largest difference by dtype, whether the device has a fused form.

    Raises:
        AssertionError: a difference is larger than modellink-doctor allows, or a use failed.
    """
    import torch
    import torch.distributed as dist

    from modellink.core import engine
    from modellink.kernels.ops.cases import JOINED, alone, joined
    from modellink.kernels.ops.check import TOLERANCE, difference

    device = engine.current_device()
    largest: dict[str, float] = {}
    wrong: list[str] = []
    uses: set[str] = set()
    for dtype, allowed in TOLERANCE.items():
        name = str(dtype).removeprefix("torch.")
        cases = joined(device, dtype, dist.group.WORLD) if op in JOINED else alone(device, dtype)
        references: list[Any] = [None] * len(cases)
        if op not in JOINED and device.type != "cpu":  # the group has no collectives on the CPU
            references = alone(torch.device("cpu"), dtype)
        for case, reference in zip(cases, references, strict=True):
            if case.op != op:
                continue
            uses.add(case.use)
            try:
                found = difference(case)
                if reference is not None:
                    found = max(found, difference(case, reference))
            except Exception as error:
                wrong.append(f"{case.name} in {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            largest[name] = max(largest.get(name, 0.0), found)
            if found > allowed:
                wrong.append(f"{case.name} in {name} differs by {found:.1e}, allowed {allowed:.0e}")
    assert uses, f"{op} has no case in kernels.ops.cases"
    assert not wrong, "; ".join(wrong)
    return {"uses": len(uses), "largest": largest, "fused": device.type in forms(op)}


def forms(op: str) -> Any:
    """On a rank: the forms of an op by device type."""
    from modellink.kernels.ops.cases import JOINED

    file = "matmul_collective" if op in JOINED else op.removesuffix("_gradients")
    module = importlib.import_module(f"modellink.kernels.ops.{file}")
    return getattr(module, "FORMS", {})


@row("ops: every op has a row")
def complete(machine: Machine) -> str:
    found = set(machine.on_device(names))
    missing, unknown = sorted(found - set(OPS)), sorted(set(OPS) - found)
    require(not missing and not unknown, f"ops without a row: {missing}; rows without an op: {unknown}")
    return f"{len(found)} ops"


def one(machine: Machine, op: str) -> str:
    found = machine.on_device(compare, op=op)
    uses = "1 use" if found["uses"] == 1 else f"{found['uses']} uses"
    form = "fused" if found["fused"] else "plain"
    return f"{uses}, {form}; " + ", ".join(f"{name} {value:.0e}" for name, value in found["largest"].items())


for _op in OPS:
    row(f"ops: {_op}")(partial(one, op=_op))
