# SPDX-License-Identifier: Apache-2.0
"""Every use of every op on an NPU, layer by layer: what torch_npu's own parts say of our calls.

    A  the operator's schema takes the arguments
    B  with tensors that have no memory, results and gradients have the shapes and types of the plain form's
    C  torch_npu's host code comes to the expected kernel of CANN, forward and backward
    D  on the simulated device, values and gradients are those of the plain form

Functions that begin with `on_a_rank` run in a process with the simulated device (rank.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ranks import beside

KERNELS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("aclnnRmsNorm", "aclnnRmsNormGrad"), "swiglu": ("aclnnSwiGlu", "aclnnSwiGluGrad"),
    "rotary": ("aclnnRotaryPositionEmbeddingV2", "aclnnRotaryPositionEmbeddingGrad"),
    "rotary: neighbors, positions by row": (), "cross_entropy": (), "linear": (),
    "attention": ("aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"),
    "attention: packed": ("aclnnFlashAttentionVarLenScore", "aclnnFlashAttentionUnpaddingScoreGrad"),
    "attention: packed, window": ("aclnnFlashAttentionVarLenScore", "aclnnFlashAttentionUnpaddingScoreGrad"),
    "attention: soft cap": (), "attention: alibi": (), "attention: packed, soft cap": (),
    "attention_block": ("aclnnFlashAttentionScore",), "attention_block_gradients": ("aclnnFlashAttentionScoreGrad",),
    "ring_update": ("aclnnRingAttentionUpdateV2",),
    "grouped_matmul": ("aclnnGroupedMatmulV5", "aclnnGroupedMatmulV5", "aclnnGroupedMatmulV5"),
    "adamw": ("ApplyAdamW",), "adamw: decay in the gradient": (),
    "all_gather_matmul": ("aclnnAllGatherMatmul", "aclnnMatmulReduceScatter"),
    "matmul_reduce_scatter": ("aclnnMatmulReduceScatter", "aclnnAllGatherMatmul"),
    "matmul_all_reduce": ("aclnnMatmulAllReduce",)}
"""The kernels each use comes to, forward and backward, by the name of the case or of its op. None: it is composed of torch's."""
TYPES = ("bfloat16", "float16", "float32")


def expected(name: str, dtype: str) -> tuple[str, ...]:
    op = name.partition(":")[0]
    composed = dtype == "float32" or ("inner" in name and op != "matmul_all_reduce")
    if composed and op in ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"):
        return ()
    return KERNELS.get(name, KERNELS[op])


def on_a_rank(dtype: str) -> dict[str, dict[str, Any]]:
    """For every use of the ops of one process: fake shapes, kernels and difference; what failed as text."""
    import torch

    from modellink.kernels.ops.cases import alone
    kind = getattr(torch, dtype)
    fake, found = shapes(kind), {}
    for case in alone(torch.device("npu", 0), kind):
        found[case.name] = {"fake": fake[case.name]} | compared(case)
    return found


def on_a_rank_joined(dtype: str) -> dict[str, dict[str, Any]]:
    """The same for the ops over ranks."""
    import torch
    import torch.distributed as dist

    from modellink.kernels.ops.cases import joined
    cases = joined(torch.device("npu", dist.get_rank()), getattr(torch, dtype), dist.group.WORLD)
    return {case.name: compared(case) for case in cases}


def compared(case: Any) -> dict[str, Any]:
    import device

    from modellink.kernels.ops.check import difference
    del device.reached[:], device.calls[:]
    try:
        apart: Any = difference(case)
    except Exception as error:
        apart = f"{type(error).__name__}: {error}"
    return {"kernels": list(device.reached), "calls": list(device.calls), "difference": apart}


def shapes(dtype: Any) -> dict[str, str]:
    """Whether results and gradients have the plain form's shapes and types: "as plain", or what they have."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from modellink.kernels.ops.attention import compressed_causal_mask as mask
    from modellink.kernels.ops.cases import alone
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    found = {}
    mask.cache_clear()
    with FakeTensorMode():
        plain = {case.name: [(list(x.shape), str(x.dtype)) for x in case.plain()] for case in alone(torch.device("cpu"), dtype)}
        for case in alone(torch.device("npu", 0), dtype):
            try:
                fake = [(list(x.shape), str(x.dtype)) for x in case.dispatched()]
            except Exception as error:
                found[case.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            found[case.name] = "as plain" if fake == plain[case.name] else f"{fake}, plain {plain[case.name]}"
    mask.cache_clear()  # it has no memory either
    return found


def measure(pools: Callable[..., Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{dtype: {case: what was found}} on one and two ranks of the simulated device."""
    here = beside(__file__, "layers")
    found = {}
    for dtype in TYPES:
        (one,) = pools(1)(here.on_a_rank, dtype=dtype)
        first, second = pools(2)(here.on_a_rank_joined, dtype=dtype)
        for name, of_second in second.items():
            if isinstance(of_second["difference"], str) or (isinstance(first[name]["difference"], float)
                                                            and of_second["difference"] > first[name]["difference"]):
                first[name]["difference"] = of_second["difference"]
        found[dtype] = one | first
    return found
