# SPDX-License-Identifier: Apache-2.0
"""`LayerSpec`: one layer of a model, with everything that may differ from layer to layer.

`ModelSpec.layer(number)` makes it from the fields of the model and from lists of per-layer settings. Code that creates, splits,
caches or computes a layer reads it, so that a model whose layers differ needs no conditions elsewhere. Not here: what surrounds
the layers (embedding, final norm, output layer), which ModelSpec describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]
Attention = Literal["grouped", "latent"]
Normalization = Literal["RMSNorm", "LayerNorm"]
ScalingKind = Literal["linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for long sequences; see ModelSpec's `rope_scaling_*` fields.

    `original_length` is in tokens, 0 if the kind of scaling does not use it.
    """

    kind: ScalingKind
    factor: float
    original_length: int
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class RopeSpec:
    """The rotary embedding of a layer: `dim` dimensions of each query and key head are rotated.

    `interleaved`: pairs are adjacent dimensions. Default: half of `dim` apart.
    """

    dim: int
    base: float
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class ExpertSpec:
    """The mixture of experts of a layer.

    Attributes:
        count: number of experts, of which the router picks some for each token.
        ffn: hidden size of an expert.
        shared_ffn: hidden size of the expert that sees every token; None without one.
        shared_gate: the shared expert has a sigmoid gate.
    """

    count: int
    ffn: int
    shared_ffn: int | None = None
    shared_gate: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer.

    Attributes:
        number: global layer number, from 0.
        attention: `grouped` (multi-head and grouped-query attention) or `latent` (multi-head latent attention).
        heads, groups: query heads, and key/value heads that they share.
        head_dim, value_dim: size of a query or key head, and of a value head.
        nope_dim: dimensions of a latent-attention head that are not rotated.
        q_lora_rank: size of the compressed query of latent attention; None if it is not compressed.
        kv_lora_rank: size of the compressed keys and values of latent attention.
        latent_norm_epsilon: of the norms of what is compressed.
        window: sliding window in tokens, including the token itself; None: full attention.
        rope: None if the layer has no rotary embedding.
        alibi: attention has ALiBi biases.
        normalization, post_norm: kind of norm; whether there are also norms after attention and feed-forward.
        qkv_bias, dense_bias, mlp_bias: which projections have biases.
        gated, activation: of the feed-forward part and of experts.
        ffn: hidden size of the dense feed-forward part; None in a layer of experts.
        experts: None in a dense layer.
    """

    number: int
    attention: Attention
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    nope_dim: int
    q_lora_rank: int | None
    kv_lora_rank: int
    latent_norm_epsilon: float
    window: int | None
    rope: RopeSpec | None
    alibi: bool
    normalization: Normalization
    post_norm: bool
    qkv_bias: bool
    dense_bias: bool
    mlp_bias: bool
    gated: bool
    activation: Activation
    ffn: int | None
    experts: ExpertSpec | None
