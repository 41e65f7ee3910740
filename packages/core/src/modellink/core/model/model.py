# SPDX-License-Identifier: Apache-2.0
"""`Model`: embedding, megatron-core's transformer block and output layer, as a ModelSpec describes them.

Not here: the layers of the block (layers.py) and the wrapper for 16-bit precision (build.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.engine import current_device
from modellink.core.model.embedding import Embedding
from modellink.core.model.linear import OutputLinear
from modellink.core.model.state import SequenceState
from modellink.core.parallel.context import local_positions


class Model(MegatronModule):
    """One model chunk: token ids to logits, or the part of the layers that a pipeline stage holds.

    megatron-core's schedules, optimizer and gradient reduction read `pre_process`, `post_process`, `vp_stage`, `model_type`,
    `share_embeddings_and_output_weights` and `shared_embedding_or_output_weight`.

    Args:
        layers: the spec of the layers of this chunk.
        vocab_size: padded to a multiple of the tensor parallel size.
        pre_process: this chunk has the embedding.
        post_process: this chunk has the final norm and the output layer.
        vp_stage: number of the chunk among the virtual pipeline stages of this rank; None if there is one.
    """

    model_type = None  # the schedules ask for it, decoders need none

    def __init__(self, config: Any, spec: ModelSpec, layers: Any, *, vocab_size: int, pre_process: bool, post_process: bool,
                 vp_stage: int | None = None) -> None:
        super().__init__(config)
        self.spec, self.pre_process, self.post_process, self.vp_stage = spec, pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = spec.tied
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = self.pg_collection.tp
        if pre_process:
            self.embedding = Embedding(config, spec, vocab_size, self.tp_group)
        self.decoder = TransformerBlock(config=config, spec=layers, pre_process=pre_process, post_process=post_process,
                                        pg_collection=self.pg_collection, vp_stage=vp_stage)
        if post_process:
            self.output_layer = OutputLinear(
                config.hidden_size, vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_bias_add=False, gather_output=False, skip_weight_param_allocation=pre_process and spec.tied,
                tp_group=self.tp_group)
            self.output_layer.normalize = spec.normalize_output_weights
        self._mark_shared_weights()

    def _mark_shared_weights(self) -> None:
        """Tell the optimizer which parameters are embeddings, and make both copies of a tied one equal."""
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        weight: Any = self.shared_embedding_or_output_weight()
        if not self.spec.tied or weight is None:
            return
        if self.pre_process and self.post_process:
            weight.zero_out_wgrad = True  # both uses add to one gradient buffer, which must start at zero
            return
        weight.shared_embedding = True
        if self.post_process:  # the copy starts at zero, so that the sum is the embedding
            weight.data.fill_(0)
            weight.shared = True
        weight.data = weight.data.to(current_device())
        dist.all_reduce(weight.data, group=self.pg_collection.embd)

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """The weight of the embedding or, on a last stage without one, of the output layer."""
        if self.pre_process:
            weight: nn.Parameter = self.embedding.word_embeddings.weight
            return weight
        return self.output_layer.weight if self.post_process else None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the hidden states of the stage before; megatron-core's schedules call it."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, input_ids: Tensor, state: SequenceState | None = None) -> Tensor:
        """Token ids [batch, seq] -> logits [batch, seq, vocabulary / tp]; hidden states on chunks without output layer.

        Entries beyond the true vocabulary have probability 0. With context parallelism seq is the length on this rank. With
        `state.wanted` the logits are [batch, n, vocabulary / tp]: those of a full prompt are large and rarely needed.
        """
        cp = parallel_state.get_context_parallel_world_size()
        if cp > 1 and (state is None or state.positions is None):
            state = state or SequenceState()
            state.length = cp * input_ids.size(1)
            state.positions = local_positions(input_ids.size(1), input_ids.device).expand(len(input_ids), -1)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids, None if state is None else state.positions)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=state)
        return self._logits(hidden, state) if self.post_process else hidden

    def _logits(self, hidden: Tensor, state: SequenceState | None) -> Tensor:
        """[seq (/ tp with sequence parallelism), batch, hidden] -> [batch, seq or n, vocabulary / tp]."""
        if state is not None and state.wanted is not None:
            hidden = hidden.gather(0, state.wanted.t().unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        if (scale := self.spec.output_multiplier_scale) != 1.0:
            hidden = hidden * scale
        weight = self.shared_embedding_or_output_weight() if self.spec.tied else None
        logits: Tensor = self.output_layer(hidden, weight=weight)[0].transpose(0, 1)
        if cap := self.spec.output_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        size = logits.size(-1)
        real = self.spec.vocab_size - parallel_state.get_tensor_model_parallel_rank() * size
        if real < size:
            logits[..., max(real, 0):] = torch.finfo(logits.dtype).min  # -inf makes NaN on a rank that has only padding
        return logits

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: Any = None) -> dict[str, Any]:
        """megatron-core's; the output layer follows the padding of the embedding, and a tied copy has its name."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name = f"{prefix}output_layer.weight"
        state.pop(f"{prefix}output_layer._extra_state", None)  # always empty, and checkpoints of Megatron lack it
        if not self.post_process:
            return state
        if not self.spec.tied:
            state[name].allow_shape_mismatch = True
        elif not self.pre_process:
            replica = (1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))  # a copy of the first stage's
            state[name] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.output_layer.weight, key=f"{prefix}embedding.word_embeddings.weight", replica_id=replica,
                allow_shape_mismatch=True, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        return state
