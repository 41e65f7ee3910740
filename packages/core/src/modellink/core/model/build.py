# SPDX-License-Identifier: Apache-2.0
"""Builds the model chunks of a rank from a ModelSpec and the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core import engine
from modellink.core.config import MemoryConfig, MoEConfig
from modellink.core.model.feed_forward import ACTIVATIONS
from modellink.core.model.layers import block_spec
from modellink.core.model.model import Model
from modellink.core.parallel.attention import SequenceCut
from modellink.kernels.parallel import ParallelLayout, padded_vocab_size


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a run that affect the model, in addition to its architecture."""

    layout: ParallelLayout = ParallelLayout()
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    make_vocab_size_divisible_by: int = 1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02
    moe: MoEConfig = MoEConfig()
    sequence_cut: SequenceCut | None = None
    memory: MemoryConfig = MemoryConfig()
    initialize: bool = True
    variable_seq_lengths: bool = False
    use_mc2: bool = False


@dataclass
class Config(TransformerConfig):
    """megatron-core's config with the additional fields that our router, attention and linears read."""

    spec: ModelSpec | None = None
    balance: MoEConfig = MoEConfig()
    sequence_cut: SequenceCut = SequenceCut()
    use_mc2: bool = False


def transformer_config(spec: ModelSpec, settings: BuildSettings, chunk: int = 0) -> Config:
    """megatron-core's configuration of a model chunk."""
    layout = settings.layout
    return Config(
        spec=spec, balance=settings.moe, use_mc2=settings.use_mc2,
        sequence_cut=settings.sequence_cut or SequenceCut(layout.ulysses),
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.groups, kv_channels=spec.head_dim, ffn_hidden_size=spec.ffn,
        normalization=spec.normalization, layernorm_epsilon=spec.norm_epsilon,
        layernorm_zero_centered_gamma=spec.layernorm_zero_centered_gamma,
        gated_linear_unit=spec.gated_linear_unit, activation_func=ACTIVATIONS[spec.activation_func],
        add_bias_linear=False, add_qkv_bias=spec.add_qkv_bias,
        attention_dropout=settings.attention_dropout, hidden_dropout=settings.hidden_dropout,
        init_method_std=settings.init_method_std, variable_seq_lengths=settings.variable_seq_lengths,
        params_dtype=settings.dtype, pipeline_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16, fp16=settings.dtype == torch.float16,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=settings.sequence_parallel, pipeline_model_parallel_layout=_stages(layout),
        context_parallel_size=layout.cp, expert_model_parallel_size=layout.ep, perform_initialization=settings.initialize,
        recompute_granularity=settings.memory.recompute_granularity, recompute_method=settings.memory.method_in_full,
        recompute_num_layers=settings.memory.recomputed_in_full(chunk, layout.vpp),
        **_experts(spec, settings.moe),
        # batched point-to-point silently gives wrong gradients with interleaved stages on two ranks
        overlap_p2p_comm=layout.vpp > 1, batch_p2p_comm=layout.vpp == 1,
        # fused forms that need Apex, Transformer Engine or a C++ compiler
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=False, cuda_graph_scope=[])


def _experts(spec: ModelSpec, moe: MoEConfig) -> dict[str, Any]:
    if spec.num_experts is None:
        return {"moe_token_dispatcher_type": "alltoall"}  # allgather, even unused, forbids sequences of different lengths
    return {"num_moe_experts": spec.num_experts, "moe_router_topk": spec.moe_router_topk,
            "moe_ffn_hidden_size": spec.expert_ffn, "moe_grouped_gemm": False,
            "moe_shared_expert_intermediate_size": spec.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate": spec.shared_expert_gate, "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
            "moe_router_load_balancing_type": "seq_aux_loss" if moe.seq_aux else "aux_loss",
            "moe_expert_capacity_factor": moe.capacity_factor, "moe_token_drop_policy": moe.moe_token_drop_policy,
            "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity,
            "moe_aux_loss_coeff": moe.moe_aux_loss_coeff, "moe_z_loss_coeff": moe.moe_z_loss_coeff or None}


def _stages(layout: ParallelLayout) -> list[list[str]] | None:
    """Uneven pipeline stages in megatron-core's format; None if they are even."""
    if layout.num_layer_list is None:
        return None
    stages = [["decoder"] * count for count in layout.num_layer_list]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]] if len(stages) > 1 else [
        ["embedding", *stages[0], "loss"]]


class HalfPrecision(Float16Module):
    """A model chunk in 16-bit precision that returns 16-bit logits: the loss upcasts a few rows at a time."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*inputs, fp32_output=False, **kwargs)
        return output


def build_models(spec: ModelSpec, settings: BuildSettings) -> list[Model | Float16Module]:
    """The model chunks of this rank (one without virtual pipeline stages), on the current device, randomly initialized.

    The process groups must exist (see processes.py).
    """
    layout = settings.layout
    stage = parallel_state.get_pipeline_model_parallel_rank()
    models = []
    for chunk in range(layout.vpp):
        config = transformer_config(spec, settings, chunk)
        model = Model(
            config, spec, block_spec(spec, layout.layers(spec.num_layers, stage, chunk), grouped=settings.moe.moe_grouped_gemm),
            vocab_size=padded_vocab_size(spec.vocab_size, layout.tp, settings.make_vocab_size_divisible_by),
            pre_process=stage == 0 and chunk == 0, post_process=stage == layout.pp - 1 and chunk == layout.vpp - 1,
            vp_stage=chunk if layout.vpp > 1 else None)
        model.to(engine.current_device())  # our own modules, such as norms, are created on the CPU
        models.append(HalfPrecision(config, model) if settings.dtype in (torch.bfloat16, torch.float16) else model)
    return models
