# SPDX-License-Identifier: Apache-2.0
"""Runs the compiled step over a model's own parameters, and says which models and passes it supports.

Supported are models with RMSNorm, rotary positions, grouped queries and a gated feed-forward, on one CPU
rank, in fp32 or bf16, if all layers are alike and have nothing in addition (experts, latent attention, caps,
ALiBi, post norms). Weights may be int8 (int8.py). Activations are fp32, whatever the precision of the weights.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from modellink.ckpt_convert.layer import LayerSpec
from modellink.ckpt_convert.spec import ModelSpec
from modellink.core.model.load import bare
from modellink.core.model.rotary import RotaryTable
from modellink.infer.cache import PagedCache
from modellink.infer.native import compiled
from modellink.infer.native.int8 import Int8Matrix, dequantize_in_forward, trim_heap
from modellink.infer.passes import Pass
from modellink.kernels.parallel import ParallelLayout

MAX_TOKENS = 16  # of a pass with prefill chunks; beyond, torch's matrix products are faster
MAX_DECODE_TOKENS = 64  # of a decode pass, whose attention costs torch more
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
# Fields of ModelSpec outside the layers that the step implements or does not depend on.
AROUND_LAYERS = {"num_layers", "hidden_size", "vocab_size", "max_position_embeddings", "norm_epsilon",
                 "layernorm_zero_centered_gamma", "untie_embeddings_and_output_weights",
                 "embedding_multiplier_scale", "query_pre_attn_scalar"}
# Fields that `ModelSpec.layer` makes LayerSpec from; `_supports_layer` judges the result.
IN_LAYERS = {"num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "normalization",
             "post_norm", "gated_linear_unit", "activation_func", "add_qkv_bias", "add_dense_bias",
             "add_mlp_bias", "position_embedding_type", "rotary_base", "rotary_percent",
             "rotary_interleaved", "rope_scaling_type", "rope_scaling_factor",
             "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
             "rope_scaling_beta_fast", "rope_scaling_beta_slow", "rope_scaling_mscale",
             "rope_scaling_mscale_all_dim", "layer_rotary_bases", "sliding_window", "window_attn_skip_freq",
             "layer_windows", "latent_norm_epsilon"}
# Fields of LayerSpec: those that may have any value, and the supported values of the others.
ANY_VALUE = {"number", "heads", "groups", "head_dim", "value_dim", "window", "rope", "qkv_bias", "ffn",
             "latent_norm_epsilon"}  # the last has no effect on grouped attention
SUPPORTED: dict[str, Collection[object]] = {
    "attention": ["grouped"], "nope_dim": [0], "q_lora_rank": [None], "kv_lora_rank": [0], "alibi": [False],
    "normalization": ["RMSNorm"], "post_norm": [False], "dense_bias": [False], "mlp_bias": [False],
    "gated": [True], "activation": ACTIVATIONS, "experts": [None]}


def supports(spec: ModelSpec, layout: ParallelLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the compiled step exists and supports this model."""
    return (_supports_model(spec) and layout.world_size == 1 and device.type == "cpu"
            and dtype in (torch.float32, torch.bfloat16) and compiled.step() is not None)


def _supports_model(spec: ModelSpec) -> bool:
    """Return whether the step supports the layers, which must be alike, and what surrounds them.

    A field of ModelSpec that is in neither of the two sets must have its default.
    """
    known = AROUND_LAYERS | IN_LAYERS
    others = [field for field in fields(spec) if field.name not in known]
    if any(getattr(spec, field.name) != field.default for field in others):
        return False
    first = spec.layer(0)
    return _supports_layer(first) and all(replace(layer, number=0) == first for layer in spec.layers)


def _supports_layer(layer: LayerSpec) -> bool:
    """Return whether the step supports a layer; it supports none with a field that it does not know."""
    values = vars(layer)
    if any(values[name] not in SUPPORTED.get(name, ()) for name in values.keys() - ANY_VALUE):
        return False
    if layer.rope is None or layer.value_dim != layer.head_dim:
        return False
    return layer.rope.scaling is None or layer.rope.scaling.kind != "dynamic"


class CompiledStep:
    """A model in the form of the compiled step, which points into the model's parameters.

    Args:
        int8: store the matrices in int8 with a scale per row. The model's own matrices are freed, except the
            embedding, and dequantized from these whenever the model runs.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, dtype: torch.dtype, *, int8: bool = False) -> None:
        self._spec, self._dtype, self._int8 = spec, dtype, int8
        self._held: list[Tensor] = []
        self._squared_error = self._squared_norm = 0.0
        self._model = cast(Any, bare(model))
        first = self._layer_spec = spec.layer(0)  # all others are like it, see `supports`
        assert first.rope is not None and first.ffn is not None
        self._table = RotaryTable(first.rope)
        self._library = compiled.step()
        self._cache: PagedCache | None = None
        layers = list(self._model.decoder.layers)
        self._layers = (compiled.Layer * len(layers))(*map(self._layer, layers))
        head = self._model.output_layer.weight
        if spec.tied:
            head = self._model.shared_embedding_or_output_weight()
        kind = KINDS[torch.int8 if int8 else dtype]
        self._c = compiled.Model(
            len(layers), spec.hidden_size, first.heads, first.groups, first.head_dim, first.ffn,
            first.rope.dim, int(first.rope.interleaved), ACTIVATIONS[first.activation], kind,
            KINDS[dtype], spec.vocab_size, spec.norm_epsilon,
            (spec.query_pre_attn_scalar or first.head_dim) ** -0.5, self._layers,
            self._gain(self._model.decoder.final_layernorm),
            self._matrix(self._model.output_layer, head, spec.vocab_size))
        if int8:
            trim_heap()

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
        """Return the first rows of a linear layer's matrix in the form of the step."""
        if not self._int8:
            return compiled.Matrix(self._hold(weight[:rows]), None)
        quantized = Int8Matrix.quantize(weight[:rows])
        exact = weight[:rows].float()
        self._squared_error += (quantized.dequantize(torch.float32) - exact).square().sum().item()
        self._squared_norm += exact.square().sum().item()
        if weight is not self._model.embedding.word_embeddings.weight:
            weight.data = weight.data.new_empty(0)
        dequantize_in_forward(linear, weight, quantized)
        return compiled.Matrix(self._hold(quantized.values), self._hold(quantized.scale))

    @property
    def error(self) -> float:
        """Root mean square error of int8 weights, relative to the root mean square of the weights."""
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def supports(self, work: Pass) -> bool:
        """Return whether the step runs a pass."""
        return work.token_ids.size(1) <= (MAX_DECODE_TOKENS if work.is_decode else MAX_TOKENS)

    def logits(self, work: Pass) -> Tensor:
        """Return the wanted logits [wanted, vocabulary] of a pass, in fp32."""
        self._point_at(work.cache)
        flat, spec, ids = work.flat(), self._spec, work.token_ids[0]
        hidden = nn.functional.embedding(ids, self._model.embedding.word_embeddings.weight).float()
        if spec.embedding_multiplier_scale != 1.0:
            hidden = hidden * torch.tensor(spec.embedding_multiplier_scale, dtype=self._dtype).float()
        cos, sin = (side.reshape(len(ids), -1) for side in self._table(
            work.length, work.positions[None], ids.device, torch.float32))
        threads, longest = torch.get_num_threads(), int(flat.count.max())
        workspace = torch.empty(self._workspace_size(len(ids)) + threads * longest)
        wanted = torch.tensor(work.wanted, dtype=torch.long)
        out = torch.empty(len(wanted), spec.vocab_size)
        pointers = [tensor.contiguous() for tensor in (hidden, cos, sin, flat.slot, flat.slots, flat.begin,
                                                       flat.count)]
        assert self._library is not None
        self._library.step(ctypes.byref(self._c), len(ids), *(tensor.data_ptr() for tensor in pointers),
                           longest, workspace.data_ptr(), len(wanted), wanted.data_ptr(), out.data_ptr(),
                           threads)
        return out

    def _workspace_size(self, tokens: int) -> int:
        """Return the floats of workspace that step.c needs for so many tokens, without the attention scores.
        """
        hidden, layer = self._spec.hidden_size, self._layer_spec
        assert layer.ffn is not None
        qkv = (layer.heads + 2 * layer.groups) * layer.head_dim
        context = layer.heads * layer.head_dim
        widest = max(hidden, context, layer.ffn)
        return tokens * (2 * hidden + qkv + context + 3 * layer.ffn + widest)

    def _point_at(self, cache: PagedCache) -> None:
        if cache is self._cache:
            return
        self._cache = cache
        for layer, keys, values in zip(self._layers, cache.keys.values(), cache.values.values(), strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
