"""`ModelSpec`: an architecture in Megatron's words.

It is filled from a Hugging Face config, a Megatron checkpoint, a preset, or the model options of a command, and everything
that builds, cuts or checks a model reads it and nothing else. Field names and option names are Megatron's.

Not here: how a family spells its config (families/), which tensors a model has (weights.py), run settings (core).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any, ClassVar, Literal

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, Resolved, option, resolve
from modellink.kernels.parallel import ParallelLayout, check_tensor_parallel


@dataclass(frozen=True)
class ModelSpec:
    section: ClassVar[str] = "model"

    num_layers: int = option(doc="Transformer layers.", minimum=1)
    hidden_size: int = option(doc="Width of the residual stream.", minimum=1)
    num_attention_heads: int = option(doc="Attention heads (of the queries).", minimum=1)
    vocab_size: int = option(doc="Tokens the model knows, without padding.", minimum=1)
    ffn_hidden_size: int | None = option(None, "Width inside the feed-forward part; 4 x hidden where nothing is said.")
    num_query_groups: int | None = option(None, "Key/value heads; as many as attention heads where nothing is said.")
    kv_channels: int | None = option(None, "Size of one head; hidden / heads where nothing is said.")
    max_position_embeddings: int = option(4096, "Longest sequence the model is meant for.", unit="tokens", minimum=1)
    normalization: Literal["RMSNorm"] = option("RMSNorm", "Kind of norm.")
    norm_epsilon: float = option(1e-5, "Added to the variance inside a norm.")
    swiglu: bool = option(True, "Feed-forward with a SiLU gate.")
    add_qkv_bias: bool = option(False, "Bias on the fused query, key and value projection.")
    add_dense_bias: bool = option(False, "Bias on the attention output projection.")
    untie_embeddings_and_output_weights: bool = option(True, "The output layer has weights of its own.")
    position_embedding_type: Literal["rope"] = option("rope", "How positions enter.")
    rotary_base: float = option(10000.0, "Base of the rotary frequencies (theta).")
    rope_scaling_type: Literal["llama3"] | None = option(None, "How rotary frequencies are stretched for long sequences.")
    rope_scaling_factor: float = option(1.0, "How far they are stretched.")
    low_freq_factor: float = option(1.0, "llama3: wavelengths longer than original length / this are stretched in full.")
    high_freq_factor: float = option(4.0, "llama3: wavelengths shorter than original length / this are kept.")
    original_max_position_embeddings: int | None = option(None, "Sequence length before stretching.", unit="tokens")

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    def check(self) -> None:
        """Raise on numbers that do not make a model."""
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ModelLinkError(f"hidden size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads",
                                 where="--hidden-size, --num-attention-heads", fix="give the head size with --kv-channels")
        if self.num_attention_heads % self.groups:
            raise ModelLinkError(f"{self.num_attention_heads} heads cannot be dealt evenly to {self.groups} query groups",
                                 where="--num-query-groups")
        if self.rope_scaling_type and not self.original_max_position_embeddings:
            raise ModelLinkError(f"rotary scaling {self.rope_scaling_type} needs the original sequence length",
                                 where="--original-max-position-embeddings")

    def check_layout(self, layout: ParallelLayout) -> None:
        """Raise when this model cannot be cut that way; the message says what would work."""
        check_tensor_parallel(layout.tp, num_attention_heads=self.num_attention_heads, num_query_groups=self.groups,
                              ffn_hidden_size=self.ffn)
        layout.check_layers(self.num_layers)

    def refuse_contradiction(self, other: ModelSpec, here: str, there: str) -> None:
        """Raise where two sources describe different models; the longest sequence is not part of what a model is."""
        mine, theirs = self.explicit(), other.explicit()
        for name, value in mine.items():
            second = theirs[name]
            close = isinstance(value, float) and isinstance(second, float) and isclose(value, second, rel_tol=1e-6)
            if value != second and not close and name != "max_position_embeddings":
                raise ModelLinkError(f"{name} is {value} in {here} and {second} in {there}", where=f"{here}, {there}",
                                     fix="they belong to different models")

    def explicit(self) -> dict[str, Any]:
        """All fields, with numbers where None stands for a default."""
        return self.to_dict() | {"ffn_hidden_size": self.ffn, "num_query_groups": self.groups, "kv_channels": self.head_dim}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def spec_from(values: Mapping[str, Any], source: str) -> ModelSpec:
    """A ModelSpec from stored or computed values; `source` names where they come from in errors."""
    resolved: Resolved = resolve([ModelSpec], Layer(source, values))
    return resolved[ModelSpec]
