"""`Model`: megatron-core's GPTModel with what a ModelSpec says of embedding and head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.linear import OutputLinear
from modellink.core.model.norm import Norm
from modellink.core.model.state import SequenceState
from modellink.core.parallel.context import local_positions


class Model(GPTModel):
    """Token ids to logits; a token beyond the true vocabulary has probability 0."""

    def __init__(self, config: Any, *args: Any, spec: ModelSpec, **kwargs: Any) -> None:
        learned = spec.position_embedding_type == "learned_absolute"
        super().__init__(config, *args, position_embedding_type="learned_absolute" if learned else "none",
                         max_sequence_length=spec.max_position_embeddings,
                         share_embeddings_and_output_weights=spec.tied, **kwargs)
        self.spec = spec
        if self.pre_process:
            words = self.embedding.word_embeddings
            if spec.embed_layernorm:
                words.norm = Norm(config, spec.hidden_size, spec.norm_epsilon)
            words.register_forward_hook(self._after_embedding)
        if self.post_process:
            self.output_layer.__class__ = OutputLinear  # megatron-core has no parameter for it
            if spec.normalize_output_weights:
                self.output_layer.register_forward_pre_hook(_normalise_weight, with_kwargs=True)

    def forward(self, input_ids: Tensor, state: SequenceState | None = None) -> Tensor:
        """Token ids [batch, seq] -> logits [batch, seq, vocabulary / tp], or hidden states where a later stage goes on.

        With context parallelism seq counts the tokens of this rank. With `state.wanted` the logits are
        [batch, n, vocabulary / tp]: those of a whole prompt are large and rarely asked for.
        """
        cp = parallel_state.get_context_parallel_world_size()
        if cp > 1 and (state is None or state.positions is None):
            state = state or SequenceState()
            state.length = cp * input_ids.size(1)
            state.positions = local_positions(input_ids.size(1), input_ids.device).expand(len(input_ids), -1)
        positions = None
        if self.pre_process and self.position_embedding_type == "learned_absolute":
            positions = state.positions if state is not None else None
            positions = torch.arange(input_ids.size(1), device=input_ids.device)[None] if positions is None else positions
        output = super().forward(input_ids, positions, None, packed_seq_params=state)
        if not self.post_process:
            return output
        if cap := self.spec.output_logit_softcapping:
            output = cap * torch.tanh(output / cap)
        size = output.size(-1)
        real = self.spec.vocab_size - parallel_state.get_tensor_model_parallel_rank() * size
        if real < size:
            output[..., max(real, 0):] = torch.finfo(output.dtype).min  # -inf would make NaN where a rank has padding only
        return output

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's, and the norm behind the embedding: its embedding knows of its own weight alone."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.pre_process and self.spec.embed_layernorm:
            inside = f"{prefix}embedding.word_embeddings.norm."
            state |= sharded_state_dict_default(self.embedding.word_embeddings.norm, inside, sharded_offsets, metadata,
                                                tp_group=self.pg_collection.tp)
        return state

    def _after_embedding(self, words: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.spec.embed_layernorm:
            output = words.norm(output)
        if (scale := self.spec.embedding_multiplier_scale) != 1.0:
            output = output * torch.tensor(scale, dtype=output.dtype)
        return output

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: SequenceState | None = None,
                     **kwargs: Any) -> Tensor:
        """megatron-core's step from the last layer (hidden states [seq, batch, hidden]) to the logits."""
        if self.post_process:
            wanted = packed_seq_params.wanted if packed_seq_params else None
            if wanted is not None:
                index = wanted.t().unsqueeze(-1).expand(-1, -1, hidden_states.size(-1))
                hidden_states = hidden_states.gather(0, index)
            if (scale := self.spec.output_multiplier_scale) != 1.0:
                hidden_states = hidden_states * scale
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        gathered = kwargs.get("runtime_gather_output")
        logits: Tensor = self.output_layer(hidden_states, weight=weight, runtime_gather_output=gathered)[0]
        return logits.transpose(0, 1)  # megatron-core would copy them into this order


def _normalise_weight(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"weight": torch.nn.functional.normalize(layer.weight)}
