# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part of a layer: dense, experts one by one or grouped, and the shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn
from torch.nn import functional as F

from modellink.ckpt_convert.layer import LayerSpec
from modellink.core.model.linear import BiasedColumnLinear, BiasedRowLinear, ColumnLinear, RowLinear
from modellink.kernels import ops


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def linears(layer: LayerSpec) -> MLPSubmodules:
    """The classes of fc1 and fc2, with or without biases."""
    if layer.mlp_bias:
        return MLPSubmodules(linear_fc1=BiasedColumnLinear, linear_fc2=BiasedRowLinear)
    return MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


class FeedForward(MLP):
    """fc1 (gate and up in one matrix if gated), activation, fc2."""

    recompute_activation = False

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[..., hidden] -> [..., hidden] and a bias that the caller adds.

        Args:
            per_token_scale: [tokens], the score of an expert for each token.
        """
        x, bias = self.linear_fc1(hidden_states)
        x = x if bias is None else x + bias
        output, bias = self.activated(x, per_token_scale, self.linear_fc2)
        if per_token_scale is not None and bias is not None:
            output = output + self.shared_bias(bias, per_token_scale)
            bias = None
        return output, bias

    def activated(self, x: Tensor, scale: Tensor | None, then: Callable[[Tensor], tuple[Tensor, Tensor | None]],
                  ) -> tuple[Tensor, Tensor | None]:
        """Apply the activation and `then`; the output of the activation is recomputed in the backward pass if configured."""
        if not (self.recompute_activation and self.training):
            return then(self._activate(x, scale))
        kept = CheckpointWithoutOutput()
        output, bias = then(kept.checkpoint(self._activate, x, scale))
        kept.discard_output_and_register_recompute(output)
        return output, bias

    def shared_bias(self, bias: Tensor, scale: Tensor) -> Tensor:
        """The contribution of an expert's bias on this rank: an equal share, as the dispatcher sums over tensor-parallel ranks.

        The gradient is that of the full bias.
        """
        share = bias / self.tp_group.size()
        return (share + (bias - share) - (bias - share).detach()) * scale.unsqueeze(-1)

    def _activate(self, x: Tensor, scale: Tensor | None) -> Tensor:
        activation = self.config.activation_func
        if not self.config.gated_linear_unit:
            x = activation(x)
        elif activation is F.silu:
            x = ops.swiglu(x)
        else:
            gate, up = x.chunk(2, dim=-1)
            x = activation(gate) * up
        return x if scale is None else (x * scale.unsqueeze(-1)).to(x.dtype)


class Experts(SequentialMLP):
    """The experts of this rank, computed one by one; a checkpoint has one tensor per expert."""

    def __init__(self, num_local_experts: int, config: Any, submodules: MLPSubmodules, pg_collection: Any) -> None:
        super().__init__(0, config, submodules, pg_collection)
        self.num_local_experts = num_local_experts
        self.local_experts = nn.ModuleList(
            FeedForward(self.config, submodules, ffn_hidden_size=self.config.moe_ffn_hidden_size, is_expert=True,
                        tp_group=pg_collection.expt_tp) for _ in range(num_local_experts))


class GroupedExperts(Experts):
    """The experts of this rank as one grouped product (--moe-grouped-gemm); the parameters of a linear share one block."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("linear_fc1", "linear_fc2"):
            linears = [getattr(expert, name) for expert in self.local_experts]
            block = torch.stack([linear.weight.detach() for linear in linears])
            for linear, weight in zip(linears, block, strict=True):
                linear.weight.data = weight

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor,
                permuted_probs: Tensor) -> tuple[Tensor, None]:
        """[tokens, hidden] sorted by expert -> the same shape; `permuted_probs` [tokens] are the scores."""
        counts, first = tokens_per_expert.tolist(), self.local_experts[0]
        assert isinstance(first, FeedForward)
        x = self._multiply(permuted_local_hidden_states, "linear_fc1", counts)
        if (bias := self._biases("linear_fc1", counts)) is not None:
            x = x + bias
        output, _ = first.activated(x, permuted_probs, lambda x: (self._multiply(x, "linear_fc2", counts), None))
        if (bias := self._biases("linear_fc2", counts)) is not None:
            output = output + first.shared_bias(bias, permuted_probs)
        return output, None

    def _multiply(self, x: Tensor, name: str, counts: list[int]) -> Tensor:
        return ops.grouped_matmul(x, [getattr(expert, name).weight for expert in self.local_experts], counts)

    def _biases(self, name: str, counts: list[int]) -> Tensor | None:
        """The bias of the expert of each token, [tokens, out]."""
        biases = [getattr(expert, name).bias for expert in self.local_experts]
        if biases[0] is None:
            return None
        return torch.cat([bias.expand(count, -1) for bias, count in zip(biases, counts, strict=True)])


class SharedExpert(SharedExpertMLP, FeedForward):
    """The expert that sees every token, with a gate if the model has one."""
