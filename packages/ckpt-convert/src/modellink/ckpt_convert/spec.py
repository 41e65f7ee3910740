# SPDX-License-Identifier: Apache-2.0
"""`ModelSpec`: the architecture of a model, in Megatron's terms.

It is read from a Hugging Face config, a Megatron checkpoint, a preset, or the model options of a command. Everything
that builds, splits or checks a model reads it and nothing else; `layer(number)` describes one layer. Fields and
options have Megatron's names.

Not here: how a family spells its config (families/), which tensors a model has (weights.py), settings of a run (core).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isclose
from typing import Any, ClassVar, Literal

from modellink.ckpt_convert.layer import Activation, ExpertSpec, LayerSpec, Normalization, RopeScaling, RopeSpec, ScalingKind
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer, Resolved, option, resolve
from modellink.kernels.parallel import ParallelLayout, check_tensor_parallel


@dataclass(frozen=True)
class ModelSpec:
    heading: ClassVar[str] = "Model architecture (from --load or --model, if given)"
    required_note: ClassVar[str] = "required without --load or --model"

    # sizes
    num_layers: int = option(doc="Number of transformer layers.", minimum=1)
    hidden_size: int = option(doc="Hidden size.", minimum=1)
    num_attention_heads: int = option(doc="Number of attention heads (of queries).", minimum=1)
    vocab_size: int = option(doc="Vocabulary size, without padding.", minimum=1)
    ffn_hidden_size: int | None = option(None, "Feed-forward hidden size. Default: 4 x hidden_size.")
    num_query_groups: int | None = option(None, "Number of key/value heads. Default: as many as attention heads.")
    kv_channels: int | None = option(None, "Size of an attention head. Default: hidden_size / num_attention_heads.")
    max_position_embeddings: int = option(4096, "Longest sequence of the model.", unit="tokens", minimum=1)

    # norms, activation, biases
    normalization: Normalization = option("RMSNorm", "Kind of norm; LayerNorm has biases.")
    norm_epsilon: float = option(1e-5, "Added to the variance inside a norm.")
    layernorm_zero_centered_gamma: bool = option(False, "The gain of a norm is 1 + its weight.",
                                                 alias="--add-rmsnorm-offset")
    post_norm: bool = option(False, "Add norms after attention and feed-forward, before the residual connection.")
    gated_linear_unit: bool = option(True, "Gated feed-forward: an activated gate is multiplied with a second projection.")
    activation_func: Activation = option("silu", "Activation function; gelu_tanh is the tanh approximation of GELU.")
    add_qkv_bias: bool = option(False, "Bias on the query, key and value projection.")
    add_dense_bias: bool = option(False, "Bias on the attention output projection.")
    add_mlp_bias: bool = option(False, "Biases in the feed-forward part.")

    # embedding, residual stream, head
    untie_embeddings_and_output_weights: bool = option(True, "The output layer does not share the embedding's weights.")
    embed_layernorm: bool = option(False, "Apply a norm to the embedding.")
    embedding_multiplier_scale: float = option(1.0, "Factor of the embedding's output.")
    scale_depth: float | None = option(None, "Multiply the outputs of attention and feed-forward by this / sqrt(num_layers).")
    output_multiplier_scale: float = option(1.0, "Factor of the output layer's input.")
    output_logit_softcapping: float | None = option(None, "Soft cap of the logits: cap x tanh(logits / cap).")
    normalize_output_weights: bool = option(False, "Normalize the rows of the output layer to length 1.")

    # positions
    position_embedding_type: Literal["rope", "alibi", "learned_absolute"] = option("rope", "Kind of position embedding.")
    rotary_base: float = option(10000.0, "Base of the rotary frequencies (theta).")
    rotary_percent: float = option(1.0, "Fraction of a head's dimensions that is rotated.", maximum=1)
    rotary_interleaved: bool = option(False, "Rotate adjacent dimensions as pairs. Default: pairs half a head apart.")
    rope_scaling_type: ScalingKind | None = option(None, "Scaling of the rotary frequencies for long sequences.")
    rope_scaling_factor: float = option(1.0, "Scaling factor of the rotary frequencies.")
    original_max_position_embeddings: int | None = option(
        None, "Sequence length before scaling.", unit="tokens", alias="--rope-scaling-original-max-position-embeddings")
    low_freq_factor: float = option(1.0, "llama3: wavelengths longer than the original length / this are fully scaled.")
    high_freq_factor: float = option(4.0, "llama3: wavelengths shorter than the original length / this are not scaled.")
    rope_scaling_beta_fast: float = option(32.0, "yarn: pairs with more rotations than this in the original length are not "
                                           "scaled.")
    rope_scaling_beta_slow: float = option(1.0, "yarn: pairs with fewer rotations than this are fully scaled.")
    rope_scaling_mscale: float = option(1.0, "yarn: weight of ln(factor) in the scale of rotated dimensions.")
    rope_scaling_mscale_all_dim: float = option(0.0, "yarn: the same for all dimensions of a head.")
    layer_rotary_bases: tuple[float, ...] | None = option(
        None, "Rotary base of each layer, 0 for none. Layers with another base than --rotary-base are not scaled. "
        "Default: --rotary-base.")

    # attention
    query_pre_attn_scalar: float | None = option(None, "Attention scores are divided by the square root of this. Default: the "
                                                 "head size.")
    attn_logit_softcapping: float | None = option(None, "Soft cap of the attention scores: cap x tanh(scores / cap).")
    sliding_window: int | None = option(None, "Sliding attention window, including the token itself.", unit="tokens", minimum=1)
    window_attn_skip_freq: int | None = option(None, "Every n-th layer has full attention. Default: all layers have the window.",
                                               minimum=2)
    layer_windows: tuple[int, ...] | None = option(
        None, "Sliding window of each layer, 0 for full attention. Default: by --sliding-window.", unit="tokens", minimum=0)
    multi_head_latent_attention: bool = option(False, "Multi-head latent attention: compressed keys and values (DeepSeek-V2).")
    q_lora_rank: int | None = option(None, "Size of the compressed query. Default: not compressed.")
    kv_lora_rank: int | None = option(None, "Size of the compressed keys and values.")
    qk_nope_head_dim: int | None = option(None, "Dimensions of a query or key head that are not rotated.")
    qk_rope_head_dim: int | None = option(None, "Dimensions of a query or key head that are rotated.")
    v_head_dim: int | None = option(None, "Size of a value head.")
    latent_norm_epsilon: float | None = option(None, "Added to the variance inside the norms of compressed queries, keys and "
                                               "values. Default: --norm-epsilon.")

    # experts
    num_experts: int | None = option(None, "Number of experts of a layer. Default: no experts.", minimum=2)
    moe_router_topk: int = option(2, "Number of experts per token.", minimum=1)
    moe_intermediate_size: int | None = option(None, "Hidden size of an expert. Default: --ffn-hidden-size.")
    first_k_dense_replace: int = option(0, "Number of dense layers at the start.", minimum=0)
    moe_layer_freq: int = option(1, "Experts in every n-th of the other layers (numbers from 0 that are a multiple of n).",
                                minimum=1)
    moe_router_pre_softmax: bool = option(False, "Router scores: softmax over all experts. Default: over the chosen ones, so "
                                          "that they sum to 1.")
    routed_scaling_factor: float = option(1.0, "Factor of the chosen experts' scores.")
    moe_router_num_groups: int | None = option(None, "Number of expert groups; experts are chosen from the best groups.",
                                               minimum=1)
    topk_group: int | None = option(None, "Number of groups to choose from, by their best expert.", minimum=1)
    moe_shared_expert_intermediate_size: int | None = option(None, "Hidden size of the shared expert, which sees every token. "
                                                             "Default: no shared expert.")
    shared_expert_gate: bool = option(False, "Multiply the shared expert's output by a sigmoid gate.")

    @property
    def head_dim(self) -> int:
        """Size of a query or key head."""
        if self.multi_head_latent_attention:
            return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        return self.v_head_dim if self.multi_head_latent_attention and self.v_head_dim else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that are rotated."""
        if self.multi_head_latent_attention:
            return self.qk_rope_head_dim or 0
        return int(self.head_dim * self.rotary_percent)

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn(self) -> int:
        """Feed-forward hidden size of a dense layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def expert_ffn(self) -> int:
        """Hidden size of an expert."""
        return self.moe_intermediate_size or self.ffn

    @property
    def tied(self) -> bool:
        """Whether the output layer shares the embedding's weights."""
        return not self.untie_embeddings_and_output_weights

    def layer(self, number: int) -> LayerSpec:
        """Return the description of layer `number` (global, from 0)."""
        return _layer(self, number)

    @property
    def layers(self) -> list[LayerSpec]:
        """The descriptions of all layers."""
        return [_layer(self, number) for number in range(self.num_layers)]

    def check(self) -> None:
        """Raise a ModelLinkError if the fields contradict each other."""
        for wrong, message, where, fix in self._rules():
            if wrong:
                raise ModelLinkError(message, where=where, fix=fix)

    def _rules(self) -> list[tuple[object, str, str, str | None]]:
        """Return (violated?, message, options, fix) of every rule."""
        latent = [self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim]
        groups, chosen = self.moe_router_num_groups, self.topk_group
        windows, bases = self.layer_windows, self.layer_rotary_bases
        return [
            (not self.multi_head_latent_attention and self.kv_channels is None and self.hidden_size % self.num_attention_heads,
             f"hidden size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads",
             "--hidden-size, --num-attention-heads", "give the head size with --kv-channels"),
            (self.num_attention_heads % self.groups,
             f"{self.num_attention_heads} heads cannot be split evenly into {self.groups} query groups", "--num-query-groups",
             None),
            (self.rope_scaling_type not in (None, "linear") and not self.original_max_position_embeddings,
             f"rotary scaling {self.rope_scaling_type} needs the original sequence length",
             "--original-max-position-embeddings", None),
            (self.position_embedding_type == "rope" and self.rotary_dim % 2,
             f"{self.rotary_dim} dimensions of a head cannot be rotated in pairs", "--rotary-percent, --kv-channels", None),
            (self.multi_head_latent_attention and None in latent, "multi-head latent attention needs four sizes",
             "--kv-lora-rank, --qk-nope-head-dim, --qk-rope-head-dim, --v-head-dim", "give all of them"),
            (self.multi_head_latent_attention and self.groups != self.num_attention_heads,
             "multi-head latent attention has one key per head", "--num-query-groups", "remove it"),
            (self.window_attn_skip_freq and not self.sliding_window, "there is no sliding window to skip",
             "--window-attn-skip-freq", "give its size with --sliding-window"),
            (windows is not None and len(windows) != self.num_layers,
             f"{len(windows or ())} windows are given for {self.num_layers} layers", "--layer-windows", "give one per layer"),
            (windows is not None and self.sliding_window, "the window is given twice", "--layer-windows, --sliding-window",
             "give one of them"),
            (bases is not None and len(bases) != self.num_layers,
             f"{len(bases or ())} rotary bases are given for {self.num_layers} layers", "--layer-rotary-bases",
             "give one per layer"),
            (bases is not None and self.position_embedding_type != "rope",
             f"rotary bases are given, but positions are {self.position_embedding_type}",
             "--layer-rotary-bases, --position-embedding-type", "use --position-embedding-type rope"),
            (self.num_experts and self.moe_router_topk > self.num_experts,
             f"{self.moe_router_topk} experts per token, but there are {self.num_experts}", "--moe-router-topk", None),
            ((groups is None) != (chosen is None), "expert groups need their number and how many are chosen",
             "--moe-router-num-groups, --topk-group", "give both"),
            (self.num_experts and groups and chosen and (self.num_experts % groups or chosen > groups),
             f"{self.num_experts} experts in {groups} groups of which {chosen} are chosen", "--moe-router-num-groups",
             "groups must have the same size, and no more than all can be chosen"),
            (self.normalize_output_weights and self.tied, "the embedding of a tied model cannot be normalized",
             "--normalize-output-weights", "use --untie-embeddings-and-output-weights"),
        ]

    def check_layout(self, layout: ParallelLayout) -> None:
        """Raise a ModelLinkError if this model cannot be split that way; the message names what works."""
        layers = self.layers
        widths = {layer.ffn for layer in layers if layer.ffn is not None}
        for experts in {layer.experts for layer in layers if layer.experts is not None}:
            widths |= {experts.ffn, *filter(None, [experts.shared_ffn])}
            layout.experts(experts.count, 0)
        check_tensor_parallel(layout.tp, num_attention_heads=self.num_attention_heads, num_query_groups=self.groups,
                              ffn_hidden_sizes=sorted(widths))
        if layout.ep > 1 and not self.num_experts:
            raise ModelLinkError(f"a model without experts cannot have an expert parallel size of {layout.ep}",
                                 where="--expert-model-parallel-size", fix="use 1")
        if self.num_attention_heads // layout.tp % layout.ulysses:
            raise ModelLinkError(f"{self.num_attention_heads} heads on {layout.tp} tensor-parallel ranks cannot be split across "
                                 f"{layout.ulysses} context-parallel ranks",
                                 where="--context-parallel-size, --context-parallel-algo",
                                 fix="use --context-parallel-algo megatron_cp_algo, which does not split heads")
        layout.check_layers(self.num_layers)

    def refuse_contradiction(self, other: ModelSpec, here: str, there: str) -> None:
        """Raise a ModelLinkError if two sources describe different models; the longest sequence may differ."""
        for name, (value, second) in self.differences(other).items():
            if name != "max_position_embeddings":
                raise ModelLinkError(f"{name} is {value} in {here} and {second} in {there}", where=f"{here}, {there}",
                                     fix="they belong to different models")

    def differences(self, other: ModelSpec) -> dict[str, tuple[Any, Any]]:
        """Return field -> (own value, the other's) for fields that mean different things."""
        mine, theirs = self.explicit(), other.explicit()

        def close(a: Any, b: Any) -> bool:
            return a == b or (isinstance(a, float) and isinstance(b, float) and isclose(a, b, rel_tol=1e-6))
        return {name: (value, theirs[name]) for name, value in mine.items() if not close(value, theirs[name])}

    def explicit(self) -> dict[str, Any]:
        """Return all fields, with defaults filled in."""
        experts = {"moe_intermediate_size": self.expert_ffn} if self.num_experts else {}
        return self.to_dict() | {"ffn_hidden_size": self.ffn, "num_query_groups": self.groups,
                                 "kv_channels": self.head_dim} | experts

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@lru_cache(maxsize=4096)
def _layer(spec: ModelSpec, number: int) -> LayerSpec:
    latent = spec.multi_head_latent_attention
    experts = _experts(spec, number)
    return LayerSpec(
        number, "latent" if latent else "grouped", heads=spec.num_attention_heads, groups=spec.groups, head_dim=spec.head_dim,
        value_dim=spec.value_dim, nope_dim=spec.qk_nope_head_dim or 0, q_lora_rank=spec.q_lora_rank,
        kv_lora_rank=spec.kv_lora_rank or 0, latent_norm_epsilon=_latent_norm_epsilon(spec),
        window=_window(spec, number), rope=_rope(spec, number),
        alibi=spec.position_embedding_type == "alibi", normalization=spec.normalization, post_norm=spec.post_norm,
        qkv_bias=spec.add_qkv_bias, dense_bias=spec.add_dense_bias, mlp_bias=spec.add_mlp_bias, gated=spec.gated_linear_unit,
        activation=spec.activation_func, ffn=spec.ffn if experts is None else None, experts=experts)


def _latent_norm_epsilon(spec: ModelSpec) -> float:
    return spec.norm_epsilon if spec.latent_norm_epsilon is None else spec.latent_norm_epsilon


def _window(spec: ModelSpec, number: int) -> int | None:
    if spec.layer_windows is not None:
        return spec.layer_windows[number] or None
    if spec.window_attn_skip_freq is not None and (number + 1) % spec.window_attn_skip_freq == 0:
        return None
    return spec.sliding_window


def _experts(spec: ModelSpec, number: int) -> ExpertSpec | None:
    if spec.num_experts is None or number < spec.first_k_dense_replace or number % spec.moe_layer_freq:
        return None
    return ExpertSpec(spec.num_experts, spec.expert_ffn, spec.moe_shared_expert_intermediate_size, spec.shared_expert_gate)


def _rope(spec: ModelSpec, number: int) -> RopeSpec | None:
    base = spec.rotary_base if spec.layer_rotary_bases is None else spec.layer_rotary_bases[number]
    if spec.position_embedding_type != "rope" or not base:
        return None
    scaling = None
    if spec.rope_scaling_type is not None and base == spec.rotary_base:
        scaling = RopeScaling(
            spec.rope_scaling_type, spec.rope_scaling_factor, spec.original_max_position_embeddings or 0, spec.low_freq_factor,
            spec.high_freq_factor, spec.rope_scaling_beta_fast, spec.rope_scaling_beta_slow, spec.rope_scaling_mscale,
            spec.rope_scaling_mscale_all_dim)
    return RopeSpec(spec.rotary_dim, base, spec.rotary_interleaved, scaling)


def spec_from(values: Mapping[str, Any], source: str) -> ModelSpec:
    """Return the ModelSpec of stored or computed values; `source` names their origin in errors."""
    resolved: Resolved = resolve([ModelSpec], Layer(source, values))
    return resolved[ModelSpec]
