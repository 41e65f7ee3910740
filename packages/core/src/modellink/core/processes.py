# SPDX-License-Identifier: Apache-2.0
"""Joins the processes of a run into megatron-core's process groups.

Not here: starting them (launch.py) and putting megatron-core on a device (engine.py).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink.core import engine
from modellink.core.launch import GRACE_AFTER_MISTAKE, LIFELINE, START, rank, under_launcher, world_size
from modellink.kernels.device import Device
from modellink.kernels.errors import InternalError, ModelLinkError
from modellink.kernels.parallel import ParallelLayout

COLLECTIVE = ("gloo", "Connection", "connection", "Socket", "NCCL", "HCCL")


def keys(generation: int) -> str:
    """Prefix of the keys in the agent's store for this start of the run and the given generation of its process groups."""
    return f"{os.environ[START]}/{generation}"


def lost_peer(error: Exception) -> bool:
    """Whether an error comes from a collective, so that its cause is on another rank."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in COLLECTIVE)


@contextlib.contextmanager
def cause_first() -> Iterator[None]:
    """If this rank lost a peer, give that peer time to report the cause, and the launcher time to stop this rank."""
    try:
        yield
    except RuntimeError as error:
        if lost_peer(error) and under_launcher() and START not in os.environ:
            time.sleep(GRACE_AFTER_MISTAKE + 5)  # the peer may still be exiting
        raise


def _end_with_the_launcher() -> None:
    """In a rank started by `spawn`: exit as soon as the launcher is gone, so that no rank keeps running alone."""
    def wait(lifeline: int) -> None:
        os.read(lifeline, 1)
        os._exit(1)

    if lifeline := os.environ.pop(LIFELINE, None):
        threading.Thread(target=wait, args=(int(lifeline),), daemon=True).start()


def _print_whole_lines() -> None:
    """Write each line with one call: ranks share an output, and torchrun's `python -u` writes the newline separately."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, write_through=False)


_groups_of: tuple[ParallelLayout, int] | None = None
"""Layout and optimizer instances of the present process groups."""
_second_ring: Any = None


def join(device: Device, layout: ParallelLayout, seed: int, *, timeout_minutes: float = 45, instances: int = 1) -> None:
    """Put megatron-core on the device and create its process groups; all ranks of a run call it once.

    Args:
        timeout_minutes: timeout of collectives of all groups.
        instances: copies of the distributed optimizer's state.

    Raises:
        ModelLinkError: the number of processes does not match the layout.
    """
    if world_size() != layout.world_size:
        raise ModelLinkError(f"{world_size()} processes were started, {layout} needs {layout.world_size}",
                             where="--nproc-per-node", fix=f"use a multiple of {layout.tp * layout.pp * layout.cp}")
    _end_with_the_launcher()
    _print_whole_lines()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # overlap needs kernels to start in launch order
    device.activate()
    engine.start(device)
    from megatron.core import parallel_state, tensor_parallel
    if not dist.is_initialized():
        if START in os.environ:
            _meet(device, keys(0), timeout_minutes)
        elif under_launcher():
            dist.init_process_group(device.backend, timeout=timedelta(minutes=timeout_minutes))
        else:
            store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
            dist.init_process_group(device.backend, store=store, rank=0, world_size=1)
    elif dist.get_world_size() != layout.world_size:
        raise InternalError(f"the process group has {dist.get_world_size()} ranks, {layout} needs {layout.world_size}")
    global _groups_of
    if _groups_of != (layout, instances) or not parallel_state.model_parallel_is_initialized():
        _end_groups()
        make_groups(layout, instances=instances, timeout_minutes=timeout_minutes)
        _groups_of = (layout, instances)
    atexit.register(leave)  # gloo's threads abort a process that exits with open groups
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()  # otherwise stages would start with the same weights
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _meet(device: Device, prefix: str, timeout_minutes: float) -> None:
    """Create the process group of all ranks over the agent's store."""
    timeout = timedelta(minutes=timeout_minutes)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    dist.init_process_group(device.backend, store=dist.PrefixStore(f"{prefix}/groups", store), rank=rank(),
                            world_size=world_size(), timeout=timeout)


def rejoin(device: Device, layout: ParallelLayout, ranks: Sequence[int], prefix: str, instances: int,
           timeout_minutes: float) -> None:
    """Replace the process groups, intact or broken, by those of `ranks` in their new order; each of `ranks` calls it."""
    global _groups_of
    number = ranks.index(rank())
    _end_groups()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(len(ranks))}
    _meet(device, prefix, timeout_minutes)
    make_groups(layout, instances=instances, timeout_minutes=timeout_minutes)
    _groups_of = (layout, instances)


def make_groups(layout: ParallelLayout, *, gloo: bool = True, instances: int = 1, timeout_minutes: float = 45) -> None:
    """Create megatron-core's process groups for a layout; `gloo`: also groups for tensors on the CPU. Others as in `join`."""
    from megatron.core import parallel_state
    nested = 1 < layout.ulysses < layout.cp
    parallel_state.initialize_model_parallel(
        hierarchical_context_parallel_sizes=[layout.ulysses, layout.cp // layout.ulysses] if nested else None,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.tp,
        num_distributed_optimizer_instances=instances,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None, create_gloo_process_groups=gloo,
        distributed_timeout_minutes=timeout_minutes)
    global _second_ring
    _second_ring = None
    if layout.cp // layout.ulysses > 1:
        order = parallel_state.RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp")
        rings = [ranks[first::layout.ulysses] for ranks in order.get_ranks("cp") for first in range(layout.ulysses)]
        for ranks in rings:  # all ranks take part in creating each group
            made = dist.new_group(ranks, timeout=timedelta(minutes=timeout_minutes))
            _second_ring = made if dist.get_rank() in ranks else _second_ring


def second_ring() -> Any:
    """A second group of the ranks in the ring of this rank."""
    return _second_ring


def _end_groups() -> None:
    """Destroy megatron-core's process groups: it would only drop its references, and each group has threads and sockets."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils
    for group in parallel_state._global_process_group_list or ():
        if group is not None:
            dist.destroy_process_group(group)
    global _second_ring
    if _second_ring is not None:
        dist.destroy_process_group(_second_ring)
        _second_ring = None
    moe_utils.get_moe_layer_wise_logging_tracker().clear()  # balance losses refer to the groups that reduce them
    parallel_state.destroy_model_parallel()
    gc.collect()  # models of an earlier layout refer to its groups


def leave() -> None:
    """Destroy all process groups."""
    if dist.is_initialized():
        from megatron.core import parallel_state
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
