"""The compiled step over a model's own parameters: which models it takes, and a pass of few tokens through it.

A model is taken when it is RMSNorm, rotary positions, grouped queries and a gated feed-forward, on one CPU rank, in fp32 or
bf16; what a family adds beyond that (experts, latent attention, caps, ALiBi, post norms) is not. Weights may be int8 (int8.py).
Between weights everything is fp32, whatever their precision.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.load import bare
from modellink.core.model.rotary import RotaryTable
from modellink.infer.cache import PagedCache
from modellink.infer.native import compiled
from modellink.infer.native.int8 import Int8, give_back, lend
from modellink.kernels.parallel import ParallelLayout

FEW_TOKENS = 16  # of a pass over pieces of prompts; beyond, torch's matrix products are faster
FEW_ROWS = 64  # of a pass over single tokens, whose attention costs torch more
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
# Fields that the step knows, or that do not matter to it; of the others each must say that the model does not have it.
KNOWN = {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "ffn_hidden_size", "num_query_groups", "kv_channels",
         "max_position_embeddings", "norm_epsilon", "activation_func", "add_qkv_bias", "untie_embeddings_and_output_weights",
         "query_pre_attn_scalar", "layernorm_zero_centered_gamma", "embedding_multiplier_scale", "sliding_window"}
ROTARY = ("rotary", "rope", "original_max", "low_freq", "high_freq")


def takes(spec: ModelSpec, layout: ParallelLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the step computes this model, and there is one."""
    plain = all(getattr(spec, field.name) == field.default for field in fields(spec)
                if field.name not in KNOWN and not field.name.startswith(ROTARY))
    return (plain and spec.rope_scaling_type != "dynamic" and layout.world_size == 1 and device.type == "cpu"
            and dtype in (torch.float32, torch.bfloat16) and compiled.step() is not None)


class Step:
    """A model as the compiled step sees it. Keep it as long as the model: it points into its parameters.

    Args:
        int8: keep the matrices in int8, with a scale for each row. The model's own are freed (but the embedding, whose rows are
            looked up), and made from these whenever the model computes.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, dtype: torch.dtype, *, int8: bool = False) -> None:
        self._spec, self._dtype, self._int8 = spec, dtype, int8
        self._held: list[Tensor] = []
        self._lost = self._whole = 0.0
        self._model = cast(Any, bare(model))
        self._table = RotaryTable(spec)
        self._library = compiled.step()
        self._cache: PagedCache | None = None
        layers = list(self._model.decoder.layers)
        self._layers = (compiled.Layer * len(layers))(*map(self._layer, layers))
        head = self._model.shared_embedding_or_output_weight() if spec.tied else self._model.output_layer.weight
        kind = KINDS[torch.int8 if int8 else dtype]
        self._c = compiled.Model(
            len(layers), spec.hidden_size, spec.num_attention_heads, spec.groups, spec.head_dim, spec.ffn, spec.rotary_dim,
            int(spec.rotary_interleaved), ACTIVATIONS[spec.activation_func], kind, KINDS[dtype], spec.vocab_size, 0,
            spec.norm_epsilon, (spec.query_pre_attn_scalar or spec.head_dim) ** -0.5, self._layers,
            self._gain(self._model.decoder.final_layernorm), self._matrix(self._model.output_layer, head, spec.vocab_size))
        if int8:
            give_back()

    def _layer(self, layer: Any) -> compiled.Layer:
        attention, mlp = layer.self_attention, layer.mlp
        bias = attention.linear_qkv.bias
        return compiled.Layer(
            self._gain(layer.input_layernorm), self._gain(layer.pre_mlp_layernorm),
            None if bias is None else self._hold(bias.float()),
            *(self._matrix(linear, linear.weight, len(linear.weight)) for linear in (
                attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)))

    def _gain(self, norm: Any) -> int:
        return self._hold(norm.weight.float() + norm.offset)

    def _hold(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach().contiguous())
        return self._held[-1].data_ptr()

    def _matrix(self, linear: nn.Module, weight: nn.Parameter, rows: int) -> compiled.Matrix:
        """The first rows of a linear's matrix as the step reads it."""
        if not self._int8:
            return compiled.Matrix(self._hold(weight[:rows]), None)
        narrow = Int8.of(weight[:rows])
        self._lost += (narrow.matrix(torch.float32) - weight[:rows].float()).square().sum().item()
        self._whole += weight[:rows].float().square().sum().item()
        if weight is not self._model.embedding.word_embeddings.weight:
            weight.data = weight.data.new_empty(0)
        lend(linear, weight, narrow)
        return compiled.Matrix(self._hold(narrow.values), self._hold(narrow.scale))

    @property
    def error(self) -> float:
        """How far int8 weights are from the true ones: the root of the mean square over that of the weights."""
        return math.sqrt(self._lost / self._whole) if self._whole else 0.0

    def takes(self, cache: PagedCache, tokens: int) -> bool:
        """Whether it computes the pass that `cache.state` was told about."""
        return tokens <= FEW_TOKENS or (tokens <= FEW_ROWS and cache.singles)

    def logits(self, ids: Tensor, cache: PagedCache, positions: Tensor, wanted: Tensor) -> Tensor:
        """Token ids [tokens] of the pass that `cache.state` was told about -> logits [wanted, vocabulary]."""
        self._point_at(cache)
        flat, spec = cache.flat(), self._spec
        hidden = nn.functional.embedding(ids, self._model.embedding.word_embeddings.weight).float()
        if spec.embedding_multiplier_scale != 1.0:
            hidden = hidden * torch.tensor(spec.embedding_multiplier_scale, dtype=self._dtype).float()
        cos, sin = (side.reshape(len(ids), -1) for side in self._table(
            int(positions.max()) + 1, positions[None], ids.device, torch.float32))
        rows = spec.groups * (spec.num_attention_heads // spec.groups + 2) * spec.head_dim
        threads, longest = torch.get_num_threads(), int(flat.count.max())
        wide = spec.num_attention_heads * spec.head_dim
        room = torch.empty(len(ids) * (2 * spec.hidden_size + rows + wide + 3 * spec.ffn + max(spec.hidden_size, wide, spec.ffn))
                           + threads * longest)
        out = torch.empty(len(wanted), spec.vocab_size)
        pointers = [tensor.contiguous() for tensor in (hidden, cos, sin, flat.slot, flat.slots, flat.begin, flat.count)]
        assert self._library is not None
        self._library.step(ctypes.byref(self._c), len(ids), *(tensor.data_ptr() for tensor in pointers), longest, room.data_ptr(),
                           len(wanted), wanted.data_ptr(), out.data_ptr(), threads)
        return out

    def _point_at(self, cache: PagedCache) -> None:
        if cache is not self._cache:
            self._cache = cache
            for number, (keys, values) in enumerate(cache.memory()):
                self._layers[number].keys, self._layers[number].values = keys.data_ptr(), values.data_ptr()
