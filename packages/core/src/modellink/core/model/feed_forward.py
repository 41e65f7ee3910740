"""The feed-forward part of a layer, dense, as one expert, or as the expert that sees every token."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn
from torch.nn import functional as F

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.linear import BiasedColumnParallelLinear, BiasedRowParallelLinear
from modellink.kernels import ops


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}


def linears(spec: ModelSpec) -> MLPSubmodules:
    """fc1 and fc2, with biases where the model has them."""
    if spec.add_mlp_bias:
        return MLPSubmodules(linear_fc1=BiasedColumnParallelLinear, linear_fc2=BiasedRowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class FeedForward(MLP):
    """fc1 (gate and up in one where the activation is gated), activation, fc2."""

    recompute_activation = False

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[..., hidden] -> [..., hidden], and a bias still to be added; `per_token_scale` [tokens] is an expert's score."""
        x, bias = self.linear_fc1(hidden_states)
        x = x if bias is None else x + bias
        if self.recompute_activation and self.training:
            kept = CheckpointWithoutOutput()
            output, bias = self.linear_fc2(kept.checkpoint(self._activate, x, per_token_scale))
            kept.discard_output_and_register_recompute(output)
        else:
            output, bias = self.linear_fc2(self._activate(x, per_token_scale))
        if per_token_scale is not None and bias is not None:
            # every tensor-parallel rank adds its share: the dispatcher sums their outputs. The gradient is that of the whole
            share = bias / self.tp_group.size()
            bias = share + (bias - share) - (bias - share).detach()
            output = output + bias * per_token_scale.unsqueeze(-1)
            bias = None
        return output, bias

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


class SharedExpert(SharedExpertMLP, FeedForward):
    """The expert that sees every token, behind a gate where the model has one."""
