"""The feed-forward part of a layer, dense, as one expert, or as the expert that sees every token."""

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

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.linear import BiasedColumnLinear, BiasedRowLinear, ColumnLinear, RowLinear
from modellink.kernels import ops


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def linears(spec: ModelSpec) -> MLPSubmodules:
    """fc1 and fc2, with biases where the model has them."""
    if spec.add_mlp_bias:
        return MLPSubmodules(linear_fc1=BiasedColumnLinear, linear_fc2=BiasedRowLinear)
    return MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


class FeedForward(MLP):
    """fc1 (gate and up in one where the activation is gated), activation, fc2."""

    recompute_activation = False

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[..., hidden] -> [..., hidden], and a bias still to be added; `per_token_scale` [tokens] is an expert's score."""
        x, bias = self.linear_fc1(hidden_states)
        x = x if bias is None else x + bias
        output, bias = self.activated(x, per_token_scale, self.linear_fc2)
        if per_token_scale is not None and bias is not None:
            output = output + self.shared_bias(bias, per_token_scale)
            bias = None
        return output, bias

    def activated(self, x: Tensor, scale: Tensor | None, then: Callable[[Tensor], tuple[Tensor, Tensor | None]],
                  ) -> tuple[Tensor, Tensor | None]:
        """The activation, and what comes behind it; the former's output is dropped and computed again where that is wanted."""
        if not (self.recompute_activation and self.training):
            return then(self._activate(x, scale))
        kept = CheckpointWithoutOutput()
        output, bias = then(kept.checkpoint(self._activate, x, scale))
        kept.discard_output_and_register_recompute(output)
        return output, bias

    def shared_bias(self, bias: Tensor, scale: Tensor) -> Tensor:
        """What an expert's bias adds: every tensor-parallel rank its share, as the dispatcher sums their outputs. The gradient is
        that of the whole."""
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
    """The experts of this rank, one after the other; their checkpoint has a tensor an expert."""

    def __init__(self, num_local_experts: int, config: Any, submodules: MLPSubmodules, pg_collection: Any) -> None:
        super().__init__(0, config, submodules, pg_collection)
        self.num_local_experts = num_local_experts
        self.local_experts = nn.ModuleList(
            FeedForward(self.config, submodules, ffn_hidden_size=self.config.moe_ffn_hidden_size, is_expert=True,
                        tp_group=pg_collection.expt_tp) for _ in range(num_local_experts))


class GroupedExperts(Experts):
    """The experts of this rank as one product (--moe-grouped-gemm); the same parameters, which lie in one block a linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("linear_fc1", "linear_fc2"):
            linears = [getattr(expert, name) for expert in self.local_experts]
            block = torch.stack([linear.weight.detach() for linear in linears])
            for linear, weight in zip(linears, block, strict=True):
                linear.weight.data = weight

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor,
                permuted_probs: Tensor) -> tuple[Tensor, None]:
        """[tokens, hidden] sorted by expert -> the same; scores [tokens]."""
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
        """The bias of each token's expert."""
        biases = [getattr(expert, name).bias for expert in self.local_experts]
        if biases[0] is None:
            return None
        return torch.cat([bias.expand(count, -1) for bias, count in zip(biases, counts, strict=True)])


class SharedExpert(SharedExpertMLP, FeedForward):
    """The expert that sees every token, behind a gate where the model has one."""
