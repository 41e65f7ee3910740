# SPDX-License-Identifier: Apache-2.0
"""megatron-core's parallel linears, with collectives fused into the product (--use-mc2) and biases chosen per linear."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from modellink.kernels import ops


class Product:
    """Replaces the product of megatron-core's linears by `ops.linear` on a CPU, where no communication overlaps with it.

    Not for fp32 inference: oneDNN compiles and caches a kernel per number of rows, which differs in every batch.
    """

    training: bool

    def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None = None, sequence_parallel: bool = False,
                      allreduce_dgrad: bool = False, **kwargs: Any) -> Tensor:
        taken = input.is_cpu and (self.training or input.dtype != torch.float32)
        if not taken or sequence_parallel or (allreduce_dgrad and torch.is_grad_enabled()):
            output: Tensor = super()._forward_impl(  # type: ignore[misc]
                input, weight, bias=bias, sequence_parallel=sequence_parallel, allreduce_dgrad=allreduce_dgrad, **kwargs)
            return output
        output = ops.linear(input, weight)
        return output if bias is None else output + bias


class ColumnLinear(Product, ColumnParallelLinear):
    """[seq (/ tp with sequence parallelism), batch, in] -> [seq, batch, out / tp]."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None = None, sequence_parallel: bool = False,
                      **kwargs: Any) -> Tensor:
        if not (self.config.use_mc2 and sequence_parallel):
            return super()._forward_impl(input, weight, bias=bias, sequence_parallel=sequence_parallel, **kwargs)
        output = ops.all_gather_matmul(input.flatten(0, 1), weight, self.tp_group).unflatten(0, (-1, input.size(1)))
        return output if bias is None else output + bias


class RowLinear(Product, RowParallelLinear):
    """[seq, batch, in / tp] -> [seq (/ tp with sequence parallelism), batch, out]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.config.use_mc2 or self.explicit_expert_comm:
            output: tuple[Tensor, Tensor | None] = super().forward(input_)
            return output
        joined = ops.matmul_reduce_scatter if self.sequence_parallel else ops.matmul_all_reduce
        product = joined(input_.flatten(0, 1), self.weight, self.tp_group).unflatten(0, (-1, input_.size(1)))
        if self.skip_bias_add or self.bias is None:
            return product, self.bias
        return product + self.bias, None


class OutputLinear(Product, ColumnParallelLinear):
    """Hidden states [seq, batch, hidden] -> logits [seq, batch, vocabulary / tp].

    Attributes:
        normalize: scale the rows of the weight to length 1.
    """

    normalize = False

    def forward(self, input_: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.normalize:  # here and not in the caller: the hooks of --overlap-param-gather have run
            weight = nn.functional.normalize(self.weight if weight is None else weight)
        output: tuple[Tensor, Tensor | None] = super().forward(input_, weight=weight, **kwargs)
        return output


class BiasedColumnLinear(ColumnLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))


class BiasedRowLinear(RowLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))


class ReplicatedLinear(nn.Module):
    """[..., in] -> [..., out] with the full matrix on every tensor-parallel rank.

    With sequence parallelism each rank sees different tokens, and megatron-core sums the gradient over ranks.
    """

    def __init__(self, config: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)
