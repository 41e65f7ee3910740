# SPDX-License-Identifier: Apache-2.0
"""The content of one rank's file of a Megatron checkpoint: arguments, counters, and the model chunks.

The arguments are those that Megatron's and the original's loaders look for. Not here: the names of tensors
(dialects.py) and the file format (storage/archive.py).
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.megatron import dialects, legacy
from modellink.ckpt_convert.megatron.dialects import Dialect
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage.tensors import dtype_name
from modellink.ckpt_convert.storage.writing import Planned
from modellink.kernels.parallel import ParallelLayout, padded_vocab_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Style:
    """How a Megatron checkpoint is written: dialect, experts grouped or separate, padding of the vocabulary."""

    legacy: bool = False
    dialect: Dialect = "megatron-core"
    grouped: bool = False
    divisible_by: int = 1


def rank_state(spec: ModelSpec, layout: ParallelLayout, models: list[dict[str, Planned]], style: Style, *,
               iteration: int, dtype: torch.dtype, adapter: AdapterConfig | None = None) -> dict[str, Any]:
    """Return the content of one rank's file.

    Args:
        models: the rank's model chunks under our names.
        adapter: the configuration, if the chunks are of a LoRA adapter.
    """
    args = arguments(spec, layout, style, dtype=dtype, iteration=iteration)
    if adapter:
        names = {name.rpartition(".lora_")[0].rpartition(".")[2] for model in models for name in model}
        vars(args).update(lora_r=adapter.r, lora_alpha=adapter.alpha, lora_target_modules=sorted(names))
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": iteration,
                             "num_floating_point_operations_so_far": 0}
    for chunk, model in enumerate(models):
        named: Mapping[str, Any]
        if style.legacy:
            named = legacy.state_of(model, tied=spec.tied)
        else:
            named = dialects.named(model, style.dialect, grouped=style.grouped)
        state["model" if layout.vpp == 1 else f"model{chunk}"] = OrderedDict(named)
    return state


def arguments(spec: ModelSpec, layout: ParallelLayout, style: Style, *, dtype: torch.dtype,
              iteration: int) -> Namespace:
    """Return the arguments that Megatron's loader expects in a checkpoint."""
    per_chunk = spec.num_layers // (layout.pp * layout.vpp) if layout.vpp > 1 else None
    padded = padded_vocab_size(spec.vocab_size, layout.tp, style.divisible_by)
    rotary = spec.position_embedding_type == "rope"
    architecture = {name: value for name, value in spec.to_dict().items()
                    if name not in ("vocab_size", "activation_func")}
    namespace = Namespace(**architecture)
    vars(namespace).update(
        ffn_hidden_size=spec.ffn, num_query_groups=spec.groups,
        group_query_attention=spec.groups != spec.num_attention_heads, kv_channels=spec.head_dim,
        seq_length=spec.max_position_embeddings,
        add_position_embedding=spec.position_embedding_type == "learned_absolute",
        use_rotary_position_embeddings=rotary, use_rope_scaling=spec.rope_scaling_type == "llama3",
        apply_layernorm_1p=spec.layernorm_zero_centered_gamma, apply_query_key_layer_scaling=False,
        swiglu=spec.gated_linear_unit and spec.activation_func == "silu", add_bias_linear=spec.add_mlp_bias,
        make_vocab_size_divisible_by=style.divisible_by, padded_vocab_size=padded, tokenizer_type=None,
        use_mcore_models=not style.legacy, moe_grouped_gemm=style.grouped,
        n_shared_experts=(spec.moe_shared_expert_intermediate_size or 0) // spec.expert_ffn or None,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, context_parallel_size=1,
        expert_model_parallel_size=layout.ep, sequence_parallel=False,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=per_chunk,
        num_layer_list=",".join(map(str, layout.num_layer_list)) if layout.num_layer_list else None,
        params_dtype=dtype, fp16=dtype_name(dtype) == "float16", bf16=dtype_name(dtype) == "bfloat16",
        world_size=layout.tp * layout.pp * layout.ep, iteration=iteration, consumed_train_samples=0,
        consumed_valid_samples=0)
    return namespace
