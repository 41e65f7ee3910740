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

    # sizes
    num_layers: int = option(doc="Transformer layers.", minimum=1)
    hidden_size: int = option(doc="Width of the residual stream.", minimum=1)
    num_attention_heads: int = option(doc="Attention heads (of the queries).", minimum=1)
    vocab_size: int = option(doc="Tokens the model knows, without padding.", minimum=1)
    ffn_hidden_size: int | None = option(None, "Width inside the feed-forward part; 4 x hidden where nothing is said.")
    num_query_groups: int | None = option(None, "Key/value heads; as many as attention heads where nothing is said.")
    kv_channels: int | None = option(None, "Size of one head; hidden / heads where nothing is said.")
    max_position_embeddings: int = option(4096, "Longest sequence the model is meant for.", unit="tokens", minimum=1)

    # norms, activation, biases
    normalization: Literal["RMSNorm", "LayerNorm"] = option("RMSNorm", "Kind of norm; LayerNorm has biases.")
    norm_epsilon: float = option(1e-5, "Added to the variance inside a norm.")
    layernorm_zero_centered_gamma: bool = option(False, "The gain of a norm is 1 + its weight.",
                                                 alias="--add-rmsnorm-offset")
    post_norm: bool = option(False, "Norms also behind attention and feed-forward, before they are added to the residual.")
    gated_linear_unit: bool = option(True, "The feed-forward part multiplies an activated gate with a second projection.")
    activation_func: Literal["silu", "gelu", "gelu_tanh"] = option("silu", "Activation; gelu_tanh is the approximated GELU.")
    add_qkv_bias: bool = option(False, "Bias on the fused query, key and value projection.")
    add_dense_bias: bool = option(False, "Bias on the attention output projection.")
    add_mlp_bias: bool = option(False, "Biases in the feed-forward part.")

    # embedding, residual stream, head
    untie_embeddings_and_output_weights: bool = option(True, "The output layer has weights of its own.")
    embed_layernorm: bool = option(False, "A norm behind the embedding.")
    embedding_multiplier_scale: float = option(1.0, "The embedding's output is multiplied by this.")
    scale_depth: float | None = option(None, "Attention and feed-forward are multiplied by this / sqrt(layers) before they are "
                                       "added to the residual.")
    output_multiplier_scale: float = option(1.0, "What enters the output layer is multiplied by this.")
    output_logit_softcapping: float | None = option(None, "Logits become cap x tanh(logits / cap).")
    normalize_output_weights: bool = option(False, "Rows of the output layer are scaled to length 1 when used.")

    # positions
    position_embedding_type: Literal["rope", "alibi", "learned_absolute"] = option("rope", "How positions enter.")
    rotary_base: float = option(10000.0, "Base of the rotary frequencies (theta).")
    rotary_percent: float = option(1.0, "Share of a head that is rotated.", maximum=1)
    rotary_interleaved: bool = option(False, "Rotary pairs are neighbours, not half a head apart.")
    rope_scaling_type: Literal["linear", "dynamic", "llama3", "yarn"] | None = option(
        None, "How rotary frequencies are stretched for long sequences.")
    rope_scaling_factor: float = option(1.0, "How far they are stretched.")
    original_max_position_embeddings: int | None = option(
        None, "Sequence length before stretching.", unit="tokens", alias="--rope-scaling-original-max-position-embeddings")
    low_freq_factor: float = option(1.0, "llama3: wavelengths longer than original length / this are stretched in full.")
    high_freq_factor: float = option(4.0, "llama3: wavelengths shorter than original length / this are kept.")
    rope_scaling_beta_fast: float = option(32.0, "yarn: pairs that turn more often than this in the original length are kept.")
    rope_scaling_beta_slow: float = option(1.0, "yarn: pairs that turn less often than this are stretched in full.")
    rope_scaling_mscale: float = option(1.0, "yarn: weight of ln(factor) in the scale of the rotated heads.")
    rope_scaling_mscale_all_dim: float = option(0.0, "yarn: the same for all dimensions of a head.")

    # attention
    query_pre_attn_scalar: float | None = option(None, "Scores are divided by the root of this, not of the head size.")
    attn_logit_softcapping: float | None = option(None, "Attention scores become cap x tanh(scores / cap).")
    sliding_window: int | None = option(None, "A token sees this many tokens, itself included.", unit="tokens", minimum=1)
    window_attn_skip_freq: int | None = option(None, "Every layer whose number (from 1) is a multiple of this sees everything; "
                                               "without it the window is in all layers.", minimum=2)
    multi_head_latent_attention: bool = option(False, "Keys and values are made from a compressed form (DeepSeek-V2).")
    q_lora_rank: int | None = option(None, "Width of the compressed query; not compressed where nothing is said.")
    kv_lora_rank: int | None = option(None, "Width of the compressed keys and values.")
    qk_nope_head_dim: int | None = option(None, "Part of a query or key head without rotation.")
    qk_rope_head_dim: int | None = option(None, "Part of a query or key head with rotation.")
    v_head_dim: int | None = option(None, "Size of a value head.")

    # experts
    num_experts: int | None = option(None, "Experts of a mixture layer; no mixture where nothing is said.", minimum=2)
    moe_router_topk: int = option(2, "Experts that see a token.", minimum=1)
    moe_intermediate_size: int | None = option(None, "Width inside an expert; --ffn-hidden-size where nothing is said.")
    first_k_dense_replace: int = option(0, "So many layers at the start have no experts.", minimum=0)
    moe_layer_freq: int = option(1, "Of the others, those whose number (from 0) is a multiple of this have experts.", minimum=1)
    moe_router_pre_softmax: bool = option(False, "Scores are a softmax over all experts; without it over the chosen ones, "
                                          "so that they sum to 1.")
    routed_scaling_factor: float = option(1.0, "Scores of the chosen experts are multiplied by this.")
    moe_router_num_groups: int | None = option(None, "Experts are chosen from the best of so many groups.", minimum=1)
    topk_group: int | None = option(None, "So many groups, those with the best single expert.", minimum=1)
    moe_shared_expert_intermediate_size: int | None = option(None, "Width of the expert that sees every token.")
    shared_expert_gate: bool = option(False, "The shared expert's output is multiplied by a sigmoid gate of the token.")

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
        """How many dimensions of a head are rotated."""
        return self.qk_rope_head_dim or 0 if self.multi_head_latent_attention else int(self.head_dim * self.rotary_percent)

    @property
    def groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def expert_ffn(self) -> int:
        return self.moe_intermediate_size or self.ffn

    @property
    def tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) is a mixture of experts."""
        return (self.num_experts is not None and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer (from 0), in tokens."""
        full = self.window_attn_skip_freq is not None and (layer + 1) % self.window_attn_skip_freq == 0
        return None if full else self.sliding_window

    def check(self) -> None:
        """Raise on numbers that do not make a model."""
        for wrong, message, where, fix in self._rules():
            if wrong:
                raise ModelLinkError(message, where=where, fix=fix)

    def _rules(self) -> list[tuple[object, str, str, str | None]]:
        """(broken?, message, options, what to do)."""
        latent = [self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim]
        groups, chosen = self.moe_router_num_groups, self.topk_group
        return [
            (not self.multi_head_latent_attention and self.kv_channels is None and self.hidden_size % self.num_attention_heads,
             f"hidden size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads",
             "--hidden-size, --num-attention-heads", "give the head size with --kv-channels"),
            (self.num_attention_heads % self.groups,
             f"{self.num_attention_heads} heads cannot be dealt evenly to {self.groups} query groups", "--num-query-groups",
             None),
            (self.rope_scaling_type not in (None, "linear") and not self.original_max_position_embeddings,
             f"rotary scaling {self.rope_scaling_type} needs the original sequence length",
             "--original-max-position-embeddings", None),
            (self.position_embedding_type == "rope" and self.rotary_dim % 2,
             f"{self.rotary_dim} dimensions of a head cannot be rotated in pairs", "--rotary-percent, --kv-channels", None),
            (self.multi_head_latent_attention and None in latent, "multi-latent attention needs four sizes",
             "--kv-lora-rank, --qk-nope-head-dim, --qk-rope-head-dim, --v-head-dim", "give all of them"),
            (self.multi_head_latent_attention and self.groups != self.num_attention_heads,
             "multi-latent attention has a key of its own for every head", "--num-query-groups", "leave it out"),
            (self.window_attn_skip_freq and not self.sliding_window, "there is no window to leave out",
             "--window-attn-skip-freq", "give its size with --sliding-window"),
            (self.num_experts and self.moe_router_topk > self.num_experts,
             f"{self.moe_router_topk} of {self.num_experts} experts cannot be chosen", "--moe-router-topk", None),
            ((groups is None) != (chosen is None), "groups of experts need their number and how many are chosen",
             "--moe-router-num-groups, --topk-group", "give both"),
            (self.num_experts and groups and chosen and (self.num_experts % groups or chosen > groups),
             f"{self.num_experts} experts in {groups} groups of which {chosen} are chosen", "--moe-router-num-groups",
             "groups are of one size, and no more than all can be chosen"),
            (self.normalize_output_weights and self.tied, "the embedding of a tied model cannot be normalised",
             "--normalize-output-weights", "use --untie-embeddings-and-output-weights"),
        ]

    def check_layout(self, layout: ParallelLayout) -> None:
        """Raise when this model cannot be cut that way; the message says what would work."""
        widths = [self.ffn] if not all(map(self.has_experts, range(self.num_layers))) else []
        if self.num_experts:
            widths += [self.expert_ffn, *filter(None, [self.moe_shared_expert_intermediate_size])]
            layout.experts(self.num_experts, 0)
        check_tensor_parallel(layout.tp, num_attention_heads=self.num_attention_heads, num_query_groups=self.groups,
                              ffn_hidden_sizes=widths)
        if layout.ep > 1 and not self.num_experts:
            raise ModelLinkError(f"a model without experts cannot be cut over {layout.ep} expert-parallel ranks",
                                 where="--expert-model-parallel-size", fix="use 1")
        if self.num_attention_heads // layout.tp % layout.ulysses:
            raise ModelLinkError(f"{self.num_attention_heads} heads on {layout.tp} tensor-parallel ranks cannot be dealt to "
                                 f"{layout.ulysses} context-parallel ranks",
                                 where="--context-parallel-size, --context-parallel-algo",
                                 fix="use --context-parallel-algo megatron_cp_algo, which leaves heads whole")
        layout.check_layers(self.num_layers)

    def refuse_contradiction(self, other: ModelSpec, here: str, there: str) -> None:
        """Raise where two sources describe different models; the longest sequence is not part of what a model is."""
        for name, (value, second) in self.differences(other).items():
            if name != "max_position_embeddings":
                raise ModelLinkError(f"{name} is {value} in {here} and {second} in {there}", where=f"{here}, {there}",
                                     fix="they belong to different models")

    def differences(self, other: ModelSpec) -> dict[str, tuple[Any, Any]]:
        """Field -> (mine, the other's), where they mean different things."""
        mine, theirs = self.explicit(), other.explicit()

        def close(a: Any, b: Any) -> bool:
            return a == b or (isinstance(a, float) and isinstance(b, float) and isclose(a, b, rel_tol=1e-6))
        return {name: (value, theirs[name]) for name, value in mine.items() if not close(value, theirs[name])}

    def explicit(self) -> dict[str, Any]:
        """All fields, with numbers where None stands for a default."""
        experts = {"moe_intermediate_size": self.expert_ffn} if self.num_experts else {}
        return self.to_dict() | {"ffn_hidden_size": self.ffn, "num_query_groups": self.groups,
                                 "kv_channels": self.head_dim} | experts

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def spec_from(values: Mapping[str, Any], source: str) -> ModelSpec:
    """A ModelSpec from stored or computed values; `source` names where they come from in errors."""
    resolved: Resolved = resolve([ModelSpec], Layer(source, values))
    return resolved[ModelSpec]
