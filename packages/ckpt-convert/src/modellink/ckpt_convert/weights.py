"""Which weights a ModelSpec has, under Megatron-Core's names with global layer numbers, and how ranks hold them.

This is the common tongue of all formats: a reader offers these tensors whole (as if TP and PP were 1, the vocabulary not
padded), a writer asks for the part its rank holds.

Not here: Hugging Face names (rules.py, families/) and file layouts (formats/).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.parallel import ParallelLayout, Split, held, padded_vocab_size

EMBEDDING, OUTPUT, FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
LAYERS, EXPERTS = "decoder.layers.", "experts.local_experts."
IN_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?:mlp\.experts\.local_experts\.(?P<expert>\d+))?(?P<rest>.+)")
"""The number of a weight's layer and, where it belongs to one, of its expert; `rest` is its name inside."""


@dataclass(frozen=True)
class Weight:
    """A full tensor: its shape ([out, in] or [out]) and how tensor parallelism cuts it."""

    shape: tuple[int, ...]
    split: Split

    @property
    def dim(self) -> int:
        """The dimension that is cut."""
        return 1 if self.split == "row" else 0


class Source(Protocol):
    """A checkpoint one can read canonical weights from; every format's reader gives one."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def family(self) -> str: ...

    @property
    def folder(self) -> Path:
        """What was opened."""
        ...

    @property
    def companions(self) -> Path:
        """The folder with config.json, generation config and tokenizer files."""
        ...

    @property
    def prompt_type(self) -> str | None:
        """The prompt template the weights were trained with, where somebody noted it."""
        ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, pieces: Sequence[range], dim: int, across: range | None = None) -> torch.Tensor:
        """The given index ranges along `dim` of the canonical tensor `name`, joined in order; of the other dimension
        `across`, or all of it. Read lazily."""
        ...

    def describe(self) -> str:
        """One line: format, layout, dtype."""
        ...


def weights(spec: ModelSpec) -> dict[str, Weight]:
    """All weights of a model by canonical name, in the order of the forward pass."""
    hidden = spec.hidden_size
    found = {EMBEDDING: Weight((spec.vocab_size, hidden), "vocab")}
    if spec.embed_layernorm:
        found |= _norm(EMBEDDING.removesuffix("weight") + "norm", spec)
    if spec.position_embedding_type == "learned_absolute":
        found["embedding.position_embeddings.weight"] = Weight((spec.max_position_embeddings, hidden), "replicated")
    for number in range(spec.num_layers):
        found |= {f"{LAYERS}{number}.{name}": weight for name, weight in _layer(spec, number).items()}
    found |= _norm(FINAL_NORM.removesuffix(".weight"), spec)
    if not spec.tied:
        found[OUTPUT] = Weight((spec.vocab_size, hidden), "vocab")
    return found


def _layer(spec: ModelSpec, number: int) -> dict[str, Weight]:
    """The weights of a layer (from 0)."""
    attention = _latent_attention(spec) if spec.multi_head_latent_attention else _attention(spec)
    found = _norm("input_layernorm", spec) | {f"self_attention.{name}": weight for name, weight in attention.items()}
    if spec.post_norm:
        found |= _norm("post_attn_norm", spec)
    found |= _norm("pre_mlp_layernorm", spec)
    feed_forward = _experts(spec) if spec.has_experts(number) else _feed_forward(spec, spec.ffn)
    found |= {f"mlp.{name}": weight for name, weight in feed_forward.items()}
    return found | (_norm("post_mlp_layernorm", spec) if spec.post_norm else {})


def _norm(name: str, spec: ModelSpec) -> dict[str, Weight]:
    kinds = ("weight", "bias") if spec.normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{kind}": Weight((spec.hidden_size,), "replicated") for kind in kinds}


def _linear(name: str, rows: int, columns: int, split: Split, *, bias: bool = False) -> dict[str, Weight]:
    found = {f"{name}.weight": Weight((rows, columns), split)}
    if bias:
        found[f"{name}.bias"] = Weight((rows,), "replicated" if split == "row" else split)
    return found


def _attention(spec: ModelSpec) -> dict[str, Weight]:
    heads = spec.num_attention_heads * spec.head_dim
    return (_linear("linear_qkv", heads + 2 * spec.groups * spec.head_dim, spec.hidden_size, "column", bias=spec.add_qkv_bias)
            | _linear("linear_proj", spec.hidden_size, heads, "row", bias=spec.add_dense_bias))


def _latent_attention(spec: ModelSpec) -> dict[str, Weight]:
    """Compressed forms are small and whole on every rank; heads are cut."""
    hidden, heads, keys = spec.hidden_size, spec.num_attention_heads, spec.kv_lora_rank or 0
    query = heads * spec.head_dim
    if spec.q_lora_rank is None:
        found = _linear("linear_q_proj", query, hidden, "column")
    else:
        found = _linear("linear_q_down_proj", spec.q_lora_rank, hidden, "replicated")
        found["q_layernorm.weight"] = Weight((spec.q_lora_rank,), "replicated")
        found |= _linear("linear_q_up_proj", query, spec.q_lora_rank, "column")
    found |= _linear("linear_kv_down_proj", keys + spec.rotary_dim, hidden, "replicated")
    found["kv_layernorm.weight"] = Weight((keys,), "replicated")
    found |= _linear("linear_kv_up_proj", heads * ((spec.qk_nope_head_dim or 0) + spec.value_dim), keys, "column")
    return found | _linear("linear_proj", hidden, heads * spec.value_dim, "row", bias=spec.add_dense_bias)


def _feed_forward(spec: ModelSpec, width: int) -> dict[str, Weight]:
    gated, bias = spec.gated_linear_unit, spec.add_mlp_bias
    return (_linear("linear_fc1", (2 if gated else 1) * width, spec.hidden_size, "gated" if gated else "column", bias=bias)
            | _linear("linear_fc2", spec.hidden_size, width, "row", bias=bias))


def _experts(spec: ModelSpec) -> dict[str, Weight]:
    found = _linear("router", spec.num_experts or 0, spec.hidden_size, "replicated")
    for number in range(spec.num_experts or 0):
        found |= {f"{EXPERTS}{number}.{name}": weight for name, weight in _feed_forward(spec, spec.expert_ffn).items()}
    if shared := spec.moe_shared_expert_intermediate_size:
        found |= {f"shared_experts.{name}": weight for name, weight in _feed_forward(spec, shared).items()}
        if spec.shared_expert_gate:
            found["shared_experts.gate_weight"] = Weight((1, spec.hidden_size), "replicated")
    return found


def stage_names(spec: ModelSpec, layout: ParallelLayout, stage: int, chunk: int = 0, expert_rank: int = 0, *,
                names: Iterable[str] | None = None) -> dict[str, str]:
    """The weights a pipeline stage's model chunk holds: its own name (layers and experts numbered from 0) -> canonical name.

    Of the weights `names`, or of all; then the last of several stages holds a copy of tied embeddings as its output layer.
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
    """Which ranges along `weight.dim` tensor-parallel rank `rank` of `tp` holds, in order.

    A vocabulary is padded to a multiple of `divisible_by` x `tp` with copies of its last row, as the original does.
    """
    size = weight.shape[weight.dim]
    if weight.split != "vocab":
        return held(weight.split, size, tp, rank)
    (rows,) = held("vocab", padded_vocab_size(size, tp, divisible_by), tp, rank)
    there = range(min(rows.start, size), min(rows.stop, size))
    return [there] * bool(there) + [range(size - 1, size)] * (len(rows) - len(there))


def read_shard(source: Source, name: str, weight: Weight, *, tp: int, rank: int, divisible_by: int = 1) -> torch.Tensor:
    """The part of a canonical tensor that tensor-parallel rank `rank` of `tp` holds."""
    return source.read(name, shard_pieces(weight, tp=tp, rank=rank, divisible_by=divisible_by), weight.dim)
