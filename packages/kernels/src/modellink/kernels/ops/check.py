# SPDX-License-Identifier: Apache-2.0
"""The measurements of modellink-doctor that need torch: devices, one collective, every use of every op
against its plain form.

On an NPU this shows what its kernels compute, which no other machine can. Under torchrun the ranks also
compare the ops over ranks. Not here: speed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from modellink.kernels.device import Device, find
from modellink.kernels.ops.cases import Case, alone, joined

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Largest allowed difference, relative to the plain result's largest value if that is above 1."""


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def devices(kind: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return rows about the device and a collective over its backend, and what failed."""
    device = find(kind, local_rank())  # type: ignore[arg-type]
    count = device.module.device_count() if device.module else 1
    rows: list[tuple[str, ...]] = [("device", str(device.torch)), ("count", str(count)),
            ("cpu threads", str(torch.get_num_threads())), ("backend", device.backend)]
    where = "all_reduce over one rank"
    try:
        with _group(device):
            where = f"all_reduce over {dist.get_world_size()} rank" + "s" * (dist.get_world_size() > 1)
            x = torch.ones(4, device=device.torch)
            dist.all_reduce(x)
            total = x.sum().item()
            good = total == 4 * dist.get_world_size()
    except Exception as error:
        return [*rows, (where, "failed")], [f"{device.backend}: {error}"]
    return [*rows, (where,
                    "works" if good else f"wrong sum {total}")], [] if good else [f"{device.backend}: wrong "
                                                                                  f"sum {total}"]


@contextlib.contextmanager
def _group(device: Device) -> Iterator[None]:
    """Join all ranks that a launcher started, once until the process ends; or only this one."""
    device.activate()
    wait = timedelta(minutes=2)
    if "RANK" in os.environ:
        if not dist.is_initialized():
            dist.init_process_group(device.backend, timeout=wait)
            atexit.register(dist.destroy_process_group)
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        dist.init_process_group(device.backend, init_method=store, rank=0, world_size=1, timeout=wait)
        try:
            yield
        finally:
            dist.destroy_process_group()


def difference(case: Case, reference: Case | None = None) -> float:
    """Return the largest difference of a result or gradient from the plain form's, relative to the plain
    one's largest value if that is above 1.

    Args:
        reference: the same use on another device, for the plain form. Default: `case`.
    """
    largest = 0.0
    for found, expected in zip(case.dispatched(), (reference or case).plain(), strict=True):
        ours, plain = found.cpu(), expected.cpu()
        where = plain.isfinite()
        if not torch.equal(where, ours.isfinite()) or not torch.equal(ours[~where], plain[~where]):
            return float("inf")
        plain, ours = plain[where].double(), ours[where].double()
        if plain.numel():
            largest = max(largest, ((ours - plain).abs().max() / plain.abs().max().clamp(min=1)).item())
    return largest


def ops(kind: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return rows of op, use, dtype, difference, and the ops that differ from their plain form by more than
    is allowed."""
    device = find(kind, local_rank())  # type: ignore[arg-type]
    rows: list[tuple[str, ...]] = []
    wrong: list[str] = []
    for dtype in TOLERANCE:
        _compare(alone(device.torch, dtype), dtype, rows, wrong)
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        with _group(device):
            for dtype in TOLERANCE:
                _compare(joined(device.torch, dtype, dist.group.WORLD), dtype, rows, wrong)
    return rows, wrong


def _compare(cases: list[Case], dtype: torch.dtype, rows: list[tuple[str, ...]], wrong: list[str]) -> None:
    allowed, name = TOLERANCE[dtype], str(dtype).removeprefix("torch.")
    for case in cases:
        try:
            found = difference(case)
        except RuntimeError as error:  # of the device: go through the other ops
            rows.append((case.op, case.use, name, "failed", f"{allowed:.0e}", "wrong"))
            wrong.append(f"op {case.name} in {name} failed: {str(error).splitlines()[0]}")
            continue
        good = found <= allowed
        rows.append((case.op, case.use, name, f"{found:.1e}", f"{allowed:.0e}", "ok" if good else "wrong"))
        if not good:
            wrong.append(f"op {case.name} in {name} differs from its plain form by {found:.1e}")
