# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on megatron-core's linears at every layout; all other parameters are frozen.

    column   y_t = W_t x + s B_t A x               A replicated, B sharded by rows like W
    row      y = sum_t (W_t x_t + s B A_t x_t)     A sharded by columns like W, B replicated

Ranks communicate between A and B, where a token has only r numbers. The replicated factor has on each rank the gradient of all
tokens; with sequence parallelism and in experts it has that of the rank's tokens, which megatron-core sums as it does for norms
(`sequence_parallel` on a parameter).

Not here: which linears (targets.py), saved adapters (saved.py), merging on disk (ckpt_convert).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from modellink.ckpt_convert.lora import A, B
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.weights import Weight, shard_pieces, stage_names
from modellink.core.adapters.saved import tensors_of
from modellink.core.config import LoraConfig
from modellink.core.model.linear import ReplicatedLinear
from modellink.core.model.load import bare
from modellink.core.model.specialize import specialize
from modellink.kernels.parallel import ParallelLayout


class Factor(nn.Module):
    """A or B: a small matrix without bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Adapted(nn.Module):
    """Base of all adapted linears; `adapt` sets its attributes."""

    scale: float
    rate: float
    gated: bool
    sequence_parallel: bool
    lora_A: Factor
    lora_B: Factor

    def dropped(self, x: Tensor, *, alike: bool) -> Tensor:
        """The adapter's input with dropout; `alike`: tensor-parallel ranks have the same input and need the same mask."""
        if not (self.rate and self.training):
            return x
        if alike:
            return F.dropout(x, self.rate)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, self.rate)

    def added(self, output: Tensor, low: Tensor) -> Tensor:
        """output [..., out] + s B low [..., r], fused into one product to avoid further passes over the output."""
        rows = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.lora_B.weight.t(), alpha=self.scale)
        return rows.view_as(output)


class AdaptedParallel(Adapted):
    """A linear sharded across tensor-parallel ranks, which defines `tp_group` and `explicit_expert_comm`."""

    tp_group: Any
    explicit_expert_comm: bool

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: Any = None) -> dict[str, Any]:
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        both: dict[str, Any] = {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}
        cut = {name: parameter.partition_dim for name, parameter in both.items()
               if getattr(parameter, "tensor_model_parallel", False)}
        state |= make_sharded_tensors_for_checkpoint(both, prefix, cut, sharded_offsets, tp_group=self.tp_group,
                                                     dp_cp_group=metadata["dp_cp_group"])
        if self.gated:  # a rank holds rows of both gate and up
            name = f"{prefix}lora_B.weight"
            whole = state[name]
            assert isinstance(whole, ShardedTensor)
            state[name] = apply_swiglu_sharded_factory(whole, sharded_offsets)
        return state


class AdaptedColumn(AdaptedParallel):
    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        low = self.lora_A(self.dropped(input_, alike=self.explicit_expert_comm or not self.sequence_parallel))
        if not self.explicit_expert_comm:  # in experts the dispatcher gathers tokens and sums gradients
            low = gather_from_sequence_parallel_region(low, group=self.tp_group) if self.sequence_parallel else (
                copy_to_tensor_model_parallel_region(low, group=self.tp_group))
        return self.added(output, low), bias


class AdaptedRow(AdaptedParallel):
    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        low = self.lora_A(self.dropped(input_, alike=False))
        if not self.explicit_expert_comm:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group) if self.sequence_parallel else (
                reduce_from_tensor_model_parallel_region(low, group=self.tp_group))
        return self.added(output, low), bias


class AdaptedReplicated(Adapted):
    """A linear that is replicated on every rank, as are its adapters."""

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(self.dropped(x, alike=not self.sequence_parallel))
        return self.added(super().forward(x), low)


@cache
def _adapted(kind: Any) -> type[nn.Module]:
    """The adapted subclass of a class of linears."""
    for base, form in ((ColumnParallelLinear, AdaptedColumn), (RowParallelLinear, AdaptedRow),
                       (ReplicatedLinear, AdaptedReplicated)):
        if issubclass(kind, base):
            return type(f"Adapted{kind.__name__}", (form, kind), {})
    raise TypeError(kind)


def adapt(module: Any, parts: Mapping[str, tuple[Weight, Tensor]], lora: LoraConfig, *, gated: bool) -> None:
    """Add an adapter to a linear in place: it keeps its weight and becomes an instance of the adapted subclass.

    Args:
        parts: the full `A` and `B`, and how they are sharded.
        gated: the linear is followed by a gated activation.
    """
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    module.sequence_parallel = module.config.sequence_parallel if hasattr(module, "config") else (
        module.weight.sequence_parallel)
    module.scale, module.rate, module.gated = lora.scale, lora.lora_dropout, gated
    for letter, (weight, full) in parts.items():
        held = torch.cat([full.narrow(weight.dim, piece.start, len(piece))
                          for piece in shard_pieces(weight, tp=tp, rank=rank)], weight.dim)
        factor = Factor(held.to(module.weight.device, module.weight.dtype, copy=True))
        if weight.split == "replicated":
            factor.weight.sequence_parallel = module.sequence_parallel  # type: ignore[attr-defined]
        else:
            set_tensor_model_parallel_attributes(factor.weight, True, weight.dim, 1)
        factor.weight.allreduce = getattr(module.weight, "allreduce", True)  # type: ignore[attr-defined]
        setattr(module, f"lora_{letter}", factor)
    kind: Any = type(module)
    specialize(module, _adapted(kind))


def add_adapters(models: Sequence[nn.Module], spec: ModelSpec, layout: ParallelLayout, lora: LoraConfig, seed: int,
                 given: Mapping[str, Tensor] | None = None) -> None:
    """Freeze the model chunks of this rank and add adapters to their linears. Load the weights before.

    Args:
        given: adapters to start from, by canonical name. Default: new ones.
    """
    table, stage = tensors_of(spec, lora, given or {}, seed), parallel_state.get_pipeline_model_parallel_rank()
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    for chunk, model in enumerate(models):
        whole: Any = bare(model)
        whole.requires_grad_(False)
        for own, name in stage_names(spec, layout, stage, chunk, expert_rank).items():
            module = name.removesuffix(".weight")
            if module + A in table:
                parts = {"A": table[module + A], "B": table[module + B]}
                adapt(whole.get_submodule(own.removesuffix(".weight")), parts, lora, gated=parts["B"][0].split == "gated")
        if whole.pre_process:  # recomputed layers have gradients only if their input requires one
            whole.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(torch.is_grad_enabled()))
