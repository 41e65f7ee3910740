"""The model on this rank, as generation sees it: token ids in, logits of the whole vocabulary out on every rank.

Importing this module imports megatron-core, so it comes after `processes.join`. Not here: pipeline stages.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from modellink.ckpt_convert.weights import Source
from modellink.core.model.build import BuildSettings, build_models
from modellink.core.model.load import load_weights
from modellink.core.model.state import SequenceState
from modellink.infer.cache import KeyValueCache
from modellink.kernels.device import Device
from modellink.kernels.parallel import ParallelLayout


class Network:
    """The model of a checkpoint, cut over the tensor-parallel ranks, with its weights."""

    def __init__(self, source: Source, layout: ParallelLayout, device: Device, dtype: torch.dtype, *, show: bool) -> None:
        self.spec, self.layout, self.dtype, self.device = source.spec, layout, dtype, device.torch
        settings = BuildSettings(layout=layout, dtype=dtype)
        models = build_models(source.spec, settings)
        load_weights(models, source, settings, show=show)
        (model,) = models
        self._model = model.eval().requires_grad_(False)

    def cache(self, batch: int, slots: int) -> KeyValueCache:
        spec = self.spec
        return KeyValueCache(range(spec.num_layers), slots, batch, spec.groups // self.layout.tp, spec.head_dim,
                             dtype=self.dtype, device=self.device)

    def logits(self, ids: Tensor, state: SequenceState | None = None) -> Tensor:
        """Token ids [batch, seq] -> logits [batch, seq (or n of `state.wanted`), vocabulary] in fp32."""
        logits = self._model(ids.to(self.device), state)
        if self.layout.tp > 1:
            logits = gather_from_tensor_model_parallel_region(logits)
        return logits[..., :self.spec.vocab_size].float()

    def agree(self, values: list[int]) -> list[int]:
        """The values of the first rank, on every rank."""
        if self.layout.tp == 1:
            return values
        tensor = torch.tensor(values, device=self.device)
        dist.broadcast(tensor, group=parallel_state.get_tensor_model_parallel_group(),
                       src=parallel_state.get_tensor_model_parallel_src_rank())
        return tensor.tolist()

    def share(self, value: str | None) -> str | None:
        """The text of the first rank, on every rank."""
        if self.layout.tp == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=parallel_state.get_tensor_model_parallel_group(),
                                   src=parallel_state.get_tensor_model_parallel_src_rank())
        return box[0]
