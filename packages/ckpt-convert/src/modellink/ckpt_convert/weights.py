"""Which weights a ModelSpec has, under Megatron-Core's names with global layer numbers, and how ranks hold them.

This is the common tongue of all formats: a reader offers these tensors whole (as if TP and PP were 1, the vocabulary not
padded), a writer asks for the part its rank holds.

Not here: Hugging Face names (rules.py, families/) and file layouts (formats/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.parallel import ParallelLayout, Split, held, padded_vocab_size

EMBEDDING, OUTPUT, FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"


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

    def read(self, name: str, pieces: Sequence[range], dim: int) -> torch.Tensor:
        """The given index ranges along `dim` of the canonical tensor `name`, joined in order; read lazily."""
        ...

    def describe(self) -> str:
        """One line: format, layout, dtype."""
        ...


def weights(spec: ModelSpec) -> dict[str, Weight]:
    """All weights of a model by canonical name, in the order of the forward pass."""
    hidden, heads, ffn = spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.ffn
    fused = heads + 2 * spec.groups * spec.head_dim
    layer = {"input_layernorm.weight": Weight((hidden,), "replicated"),
             "self_attention.linear_qkv.weight": Weight((fused, hidden), "column")}
    if spec.add_qkv_bias:
        layer["self_attention.linear_qkv.bias"] = Weight((fused,), "column")
    layer["self_attention.linear_proj.weight"] = Weight((hidden, heads), "row")
    if spec.add_dense_bias:
        layer["self_attention.linear_proj.bias"] = Weight((hidden,), "replicated")
    layer["pre_mlp_layernorm.weight"] = Weight((hidden,), "replicated")
    layer["mlp.linear_fc1.weight"] = Weight((2 * ffn, hidden), "gated") if spec.swiglu else Weight((ffn, hidden), "column")
    layer["mlp.linear_fc2.weight"] = Weight((hidden, ffn), "row")

    found = {EMBEDDING: Weight((spec.vocab_size, hidden), "vocab")}
    for number in range(spec.num_layers):
        found |= {f"decoder.layers.{number}.{name}": weight for name, weight in layer.items()}
    found[FINAL_NORM] = Weight((hidden,), "replicated")
    if not spec.tied:
        found[OUTPUT] = Weight((spec.vocab_size, hidden), "vocab")
    return found


def stage_names(spec: ModelSpec, layout: ParallelLayout, stage: int, chunk: int = 0) -> dict[str, str]:
    """The weights a pipeline stage's model chunk holds: its own name (layers numbered from 0) -> canonical name.

    The last of several stages holds a copy of tied embeddings as its output layer.
    """
    layers = layout.layers(spec.num_layers, stage, chunk)
    first = stage == 0 and chunk == 0
    last = stage == layout.pp - 1 and chunk == layout.vpp - 1
    names = {}
    for name in weights(spec):
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) in layers:
                names[f"decoder.layers.{int(number) - layers.start}.{rest}"] = name
        elif (name == EMBEDDING and first) or (name in (FINAL_NORM, OUTPUT) and last):
            names[name] = name
    if spec.tied and last and layout.pp > 1:
        names[OUTPUT] = EMBEDDING
    return names


def read_shard(source: Source, name: str, weight: Weight, *, tp: int, rank: int, divisible_by: int = 1) -> torch.Tensor:
    """The part of a canonical tensor that tensor-parallel rank `rank` of `tp` holds.

    A vocabulary is padded to a multiple of `divisible_by` x `tp` with copies of its last row, as the original does.
    """
    size = weight.shape[weight.dim]
    if weight.split != "vocab":
        return source.read(name, held(weight.split, size, tp, rank), weight.dim)
    (rows,) = held("vocab", padded_vocab_size(size, tp, divisible_by), tp, rank)
    there = range(min(rows.start, size - 1), min(rows.stop, size))
    missing = len(rows) - (there.stop - rows.start if rows.start < size else 0)
    tensor = source.read(name, [there], 0)
    if rows.start >= size:
        return tensor[-1:].expand(len(rows), -1).clone()
    return torch.cat([tensor, tensor[-1:].expand(missing, -1)]) if missing else tensor
