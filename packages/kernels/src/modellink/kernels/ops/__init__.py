# SPDX-License-Identifier: Apache-2.0
"""Ops for which accelerators have fused forms, each with one dispatching function.

`ops.rms_norm(x, ...)` picks the form by the tensor's device. Every file has the plain PyTorch form (`plain`),
which defines the op and runs anywhere, and `FORMS`, the fused forms by device type, which are tested against
it. Inside `plain_forms("rms_norm")` an op uses its plain form on every device (dispatch.py).
"""

from modellink.kernels.ops.adamw import adamw
from modellink.kernels.ops.attention import attention
from modellink.kernels.ops.attention_block import attention_block, attention_block_gradients
from modellink.kernels.ops.cross_entropy import cross_entropy
from modellink.kernels.ops.dispatch import plain_forms
from modellink.kernels.ops.grouped_matmul import grouped_matmul
from modellink.kernels.ops.linear import linear
from modellink.kernels.ops.matmul_collective import all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter
from modellink.kernels.ops.ring_update import ring_update
from modellink.kernels.ops.rms_norm import rms_norm
from modellink.kernels.ops.rotary import rotary
from modellink.kernels.ops.swiglu import swiglu

__all__ = ["adamw", "all_gather_matmul", "attention", "attention_block", "attention_block_gradients",
           "cross_entropy", "grouped_matmul", "linear", "matmul_all_reduce", "matmul_reduce_scatter",
           "plain_forms", "ring_update", "rms_norm", "rotary", "swiglu"]
