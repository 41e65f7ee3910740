"""The one function that turns a ModelSpec and run settings into megatron-core's TransformerConfig, and the models of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.layers import block_spec
from modellink.core.model.state import SequenceState
from modellink.kernels.parallel import ParallelLayout, padded_vocab_size


@dataclass(frozen=True)
class BuildSettings:
    """What a run decides about a model, beside its architecture."""

    layout: ParallelLayout = ParallelLayout()
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    make_vocab_size_divisible_by: int = 1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02


def transformer_config(spec: ModelSpec, settings: BuildSettings) -> TransformerConfig:
    layout = settings.layout
    return TransformerConfig(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.groups, kv_channels=spec.head_dim, ffn_hidden_size=spec.ffn,
        normalization=spec.normalization, layernorm_epsilon=spec.norm_epsilon,
        gated_linear_unit=spec.swiglu, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, add_qkv_bias=spec.add_qkv_bias,
        attention_dropout=settings.attention_dropout, hidden_dropout=settings.hidden_dropout,
        init_method_std=settings.init_method_std,
        params_dtype=settings.dtype, pipeline_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16, fp16=settings.dtype == torch.float16,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=settings.sequence_parallel, pipeline_model_parallel_layout=_stages(layout),
        # batched point-to-point gives wrong gradients, silently, with interleaved stages on two ranks; without it it is right
        overlap_p2p_comm=layout.vpp > 1, batch_p2p_comm=layout.vpp == 1,
        # forms that need Apex, Transformer Engine or a C++ compiler
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=False, cuda_graph_scope=[])


def _stages(layout: ParallelLayout) -> list[list[str]] | None:
    """Uneven stages in megatron-core's words."""
    if layout.num_layer_list is None:
        return None
    stages = [["decoder"] * count for count in layout.num_layer_list]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]] if len(stages) > 1 else [
        ["embedding", *stages[0], "loss"]]


class Model(GPTModel):
    """GPTModel whose logits know the padding of the vocabulary: a token that does not exist has probability 0."""

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size

    def forward(self, input_ids: Tensor, state: SequenceState | None = None) -> Tensor:
        """Token ids [batch, seq] -> logits [batch, seq, vocabulary / tp], or hidden states where a later stage goes on.

        With `state.wanted` the logits are [batch, n, vocabulary / tp]: those of a whole prompt are large and rarely asked for.
        """
        output = super().forward(input_ids, None, None, packed_seq_params=state)
        if not self.post_process:
            return output
        size = output.size(-1)
        real = self.true_vocab_size - parallel_state.get_tensor_model_parallel_rank() * size
        if real < size:
            output[..., max(real, 0):] = torch.finfo(output.dtype).min  # -inf would make NaN where a rank has padding only
        return output

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: SequenceState | None = None,
                     **kwargs: Any) -> Tensor:
        """megatron-core's step from the last layer (hidden states [seq, batch, hidden]) to the logits."""
        wanted = packed_seq_params.wanted if packed_seq_params else None
        if wanted is not None and self.post_process:
            index = wanted.t().unsqueeze(-1).expand(-1, -1, hidden_states.size(-1))
            hidden_states = hidden_states.gather(0, index)
        output: Tensor = super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        return output


def build_models(spec: ModelSpec, settings: BuildSettings) -> list[Model | Float16Module]:
    """The model chunks of this rank (one without virtual pipeline stages), on the current device, randomly initialised.

    The process groups must exist (see processes.py).
    """
    layout = settings.layout
    config = transformer_config(spec, settings)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    models = []
    for chunk in range(layout.vpp):
        model = Model(
            config, block_spec(spec, len(layout.layers(spec.num_layers, stage, chunk))),
            vocab_size=padded_vocab_size(spec.vocab_size, layout.tp, settings.make_vocab_size_divisible_by),
            true_vocab_size=spec.vocab_size, max_sequence_length=spec.max_position_embeddings,
            pre_process=stage == 0 and chunk == 0, post_process=stage == layout.pp - 1 and chunk == layout.vpp - 1,
            position_embedding_type="none", share_embeddings_and_output_weights=spec.tied,
            vp_stage=chunk if layout.vpp > 1 else None)
        model.model_type = None  # the schedules ask for it, decoders need none
        models.append(Float16Module(config, model) if settings.dtype in (torch.bfloat16, torch.float16) else model)
    return models
