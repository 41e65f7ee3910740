# SPDX-License-Identifier: Apache-2.0
"""The weights of a ModelSpec, under Megatron-Core's names with global layer numbers, and how ranks hold them.

All formats meet here: a reader offers these tensors unsharded (as if TP and PP were 1, the vocabulary not
padded), a writer asks for the part that its rank holds.

Not here: Hugging Face names (rules.py, families/) and file layouts (formats/).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from modellink.ckpt_convert.layer import ExpertSpec, LayerSpec
from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.parallel import ParallelLayout, Split, padded_vocab_size, shard_ranges

if TYPE_CHECKING:
    import torch

EMBEDDING, OUTPUT, FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
LAYERS, EXPERTS = "decoder.layers.", "experts.local_experts."
IN_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?:mlp\.experts\.local_experts\.(?P<expert>\d+))?(?P<rest>.+)")
"""Matches the name of a weight inside a layer: number of the layer, number of the expert if it has one, rest
of the name."""


@dataclass(frozen=True)
class Weight:
    """An unsharded tensor: its shape ([out, in] or [out]) and how tensor parallelism splits it."""

    shape: tuple[int, ...]
    split: Split

    @property
    def dim(self) -> int:
        """The dimension that is split."""
        return 1 if self.split == "row" else 0


class Source(Protocol):
    """A checkpoint from which canonical weights can be read; the reader of every format returns one."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def family(self) -> str: ...

    @property
    def folder(self) -> Path:
        """The folder that was opened."""
        ...

    @property
    def companions(self) -> Path:
        """The folder with config.json, generation config and tokenizer files."""
        ...

    @property
    def prompt_type(self) -> str | None:
        """The prompt template the weights were trained with, if it is recorded."""
        ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        """Read index ranges along `dim` of the canonical tensor `name`, concatenated in order; of the other
        dimension `across`, or all of it."""
        ...

    def describe(self) -> str:
        """Return one line: format, layout, dtype."""
        ...


@lru_cache(maxsize=64)
def weights(spec: ModelSpec) -> Mapping[str, Weight]:
    """Return all weights of a model by canonical name, in the order of the forward pass."""
    hidden = spec.hidden_size
    found = {EMBEDDING: Weight((spec.vocab_size, hidden), "vocab")}
    if spec.embed_layernorm:
        found |= _norm(EMBEDDING.removesuffix("weight") + "norm", hidden, spec.normalization)
    if spec.position_embedding_type == "learned_absolute":
        found["embedding.position_embeddings.weight"] = Weight((spec.max_position_embeddings, hidden),
                                                               "replicated")
    for layer in spec.layers:
        found |= {f"{LAYERS}{layer.number}.{name}": weight for name, weight in _layer(layer, hidden).items()}
    found |= _norm(FINAL_NORM.removesuffix(".weight"), hidden, spec.normalization)
    if not spec.tied:
        found[OUTPUT] = Weight((spec.vocab_size, hidden), "vocab")
    return MappingProxyType(found)


def _layer(layer: LayerSpec, hidden: int) -> dict[str, Weight]:
    """Return the weights of a layer, named inside the layer."""
    attention = (_latent_attention if layer.attention == "latent" else _attention)(layer, hidden)
    found = _norm("input_layernorm", hidden, layer.normalization)
    found |= {f"self_attention.{name}": weight for name, weight in attention.items()}
    if layer.post_norm:
        found |= _norm("post_attn_norm", hidden, layer.normalization)
    found |= _norm("pre_mlp_layernorm", hidden, layer.normalization)
    if layer.experts is not None:
        feed_forward = _experts(layer, layer.experts, hidden)
    else:
        assert layer.ffn is not None
        feed_forward = _feed_forward(layer, layer.ffn, hidden)
    found |= {f"mlp.{name}": weight for name, weight in feed_forward.items()}
    if layer.post_norm:
        found |= _norm("post_mlp_layernorm", hidden, layer.normalization)
    return found


def _norm(name: str, hidden: int, normalization: str) -> dict[str, Weight]:
    kinds = ("weight", "bias") if normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{kind}": Weight((hidden,), "replicated") for kind in kinds}


def _linear(name: str, rows: int, columns: int, split: Split, *, bias: bool = False) -> dict[str, Weight]:
    found = {f"{name}.weight": Weight((rows, columns), split)}
    if bias:
        found[f"{name}.bias"] = Weight((rows,), "replicated" if split == "row" else split)
    return found


def _attention(layer: LayerSpec, hidden: int) -> dict[str, Weight]:
    queries, keys = layer.heads * layer.head_dim, layer.groups * layer.head_dim
    return (_linear("linear_qkv", queries + 2 * keys, hidden, "column", bias=layer.qkv_bias)
            | _linear("linear_proj", hidden, queries, "row", bias=layer.dense_bias))


def _latent_attention(layer: LayerSpec, hidden: int) -> dict[str, Weight]:
    """Compressed projections are small and replicated on every rank; heads are split."""
    compressed, query = layer.kv_lora_rank, layer.heads * layer.head_dim
    if layer.q_lora_rank is None:
        found = _linear("linear_q_proj", query, hidden, "column")
    else:
        found = _linear("linear_q_down_proj", layer.q_lora_rank, hidden, "replicated")
        found["q_layernorm.weight"] = Weight((layer.q_lora_rank,), "replicated")
        found |= _linear("linear_q_up_proj", query, layer.q_lora_rank, "column")
    rotated = layer.head_dim - layer.nope_dim
    found |= _linear("linear_kv_down_proj", compressed + rotated, hidden, "replicated")
    found["kv_layernorm.weight"] = Weight((compressed,), "replicated")
    found |= _linear("linear_kv_up_proj", layer.heads * (layer.nope_dim + layer.value_dim), compressed,
                     "column")
    return found | _linear("linear_proj", hidden, layer.heads * layer.value_dim, "row", bias=layer.dense_bias)


def _feed_forward(layer: LayerSpec, width: int, hidden: int) -> dict[str, Weight]:
    if layer.gated:
        found = _linear("linear_fc1", 2 * width, hidden, "gated", bias=layer.mlp_bias)
    else:
        found = _linear("linear_fc1", width, hidden, "column", bias=layer.mlp_bias)
    return found | _linear("linear_fc2", hidden, width, "row", bias=layer.mlp_bias)


def _experts(layer: LayerSpec, experts: ExpertSpec, hidden: int) -> dict[str, Weight]:
    found = _linear("router", experts.count, hidden, "replicated")
    for number in range(experts.count):
        found |= {f"{EXPERTS}{number}.{name}": weight
                  for name, weight in _feed_forward(layer, experts.ffn, hidden).items()}
    if experts.shared_ffn:
        shared = _feed_forward(layer, experts.shared_ffn, hidden)
        found |= {f"shared_experts.{name}": weight for name, weight in shared.items()}
        if experts.shared_gate:
            found["shared_experts.gate_weight"] = Weight((1, hidden), "replicated")
    return found


def parameters(spec: ModelSpec) -> int:
    """Return the number of parameters, without padding of the vocabulary."""
    return sum(prod(weight.shape) for weight in weights(spec).values())


def stage_names(spec: ModelSpec, layout: ParallelLayout, stage: int, chunk: int = 0, expert_rank: int = 0, *,
                names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the weights of a model chunk: name in the chunk (layers and experts numbered from 0) ->
    canonical name.

    Args:
        names: only these weights. Default: all weights of the model; the last of several stages then also has
            a copy of tied embeddings as its output layer.
    """
    layers = layout.layers(spec.num_layers, stage, chunk)
    experts = layout.experts(spec.num_experts, expert_rank) if spec.num_experts else range(0)
    first = stage == 0 and chunk == 0
    last = stage == layout.pp - 1 and chunk == layout.vpp - 1
    found_names = {}
    for name in weights(spec) if names is None else names:
        if found := IN_LAYER.match(name):
            number, expert = int(found["layer"]), found["expert"]
            if number in layers and (expert is None or int(expert) in experts):
                rest = found["rest"] if expert is None else f"mlp.{EXPERTS}{int(expert) - experts.start}{found['rest']}"
                found_names[f"{LAYERS}{number - layers.start}.{rest}"] = name
        elif first if name.startswith("embedding.") else last:
            found_names[name] = name
    if spec.tied and last and layout.pp > 1 and names is None:
        found_names[OUTPUT] = EMBEDDING
    return found_names


def shard_pieces(weight: Weight, *, tp: int, rank: int, divisible_by: int = 1) -> list[range]:
    """Return the index ranges along `weight.dim` that tensor-parallel rank `rank` of `tp` holds, in order.

    A vocabulary is padded to a multiple of `divisible_by` x `tp` with copies of its last row, as in the
    original.
    """
    size = weight.shape[weight.dim]
    if weight.split != "vocab":
        return shard_ranges(weight.split, size, tp, rank)
    (rows,) = shard_ranges("vocab", padded_vocab_size(size, tp, divisible_by), tp, rank)
    present = range(min(rows.start, size), min(rows.stop, size))
    padding = [range(size - 1, size)] * (len(rows) - len(present))
    return [present, *padding] if present else padding


def read_shard(source: Source, name: str, weight: Weight, *, tp: int, rank: int,
               divisible_by: int = 1) -> torch.Tensor:
    """Read the part of a canonical tensor that tensor-parallel rank `rank` of `tp` holds."""
    return source.read(name, shard_pieces(weight, tp=tp, rank=rank, divisible_by=divisible_by), weight.dim)
